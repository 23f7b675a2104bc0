"""What every device does in a step, as boxes along the time: one row for each device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.report.canvas import (
    SIZE,
    Frame,
    figure_of_rows,
    legend,
    name_rows,
    settings,
    text_width_in,
    title,
)
from lightning_hetero.report.theme import INK, OPS, Paint, Theme, paint_of, theme_named
from lightning_hetero.schedule import TRANSFER, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WORK = (-0.38, 0.56)  # where in its row work is, and how tall; transfers run below it
_MOVES = (0.22, 0.18)
_NARROWEST_IN = 0.008  # nothing that happened vanishes
_EDGE_FROM_IN = 0.04  # narrower boxes would be all edge
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def gantt(timeline: Timeline, *, name: str = "A step", theme: str | Theme = "light") -> Figure:
    """Draw a step: work in tall boxes, transfers in flat ones below, what is left is idle.

    Where there is room, a box has the number of its micro-batch, or on devices with several stages `1F0`: stage, op,
    micro-batch. To the right stands the share of the time that the device works.

    Args:
        timeline: Predicted or measured.
        name: What it is, for the line over it.
        theme: "light" or "dark".

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: There is no such theme.
    """
    return _drawn({name: timeline}, theme)


def gantt_pair(predicted: Timeline, measured: Timeline, *, theme: str | Theme = "light") -> Figure:
    """Draw a predicted step over a measured one, each from its own start, along one axis of time.

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: There is no such theme.
    """
    return _drawn({"Predicted": predicted, "Measured": measured}, theme)


def _drawn(timelines: Mapping[str, Timeline], theme: str | Theme) -> Figure:
    look = theme_named(theme)
    devices = tuple(dict.fromkeys(device for timeline in timelines.values() for device in timeline.devices))
    longest_s = max(timeline.makespan_s for timeline in timelines.values())
    scale, unit = next(((size, word) for size, word in _UNITS if longest_s >= size), _UNITS[-1])
    with settings():
        paints = [*_paints(timelines.values()), Paint("idle", look.idle)]
        frame = Frame.around(devices, ["100 %"], paints)
        figure, all_axes = figure_of_rows(frame, [len(devices)] * len(timelines), look)
        for axes, (name, timeline) in zip(all_axes, timelines.items(), strict=True):
            shares = timeline.utilisation
            name_rows(axes, devices, [f"{100 * shares.get(device, 0.0):.0f} %" for device in devices], look)
            axes.set_xlim(0, longest_s / scale or 1.0)
            room_in = axes.get_position().width * figure.get_figwidth()
            _rows(axes, timeline, devices, scale, room_in, look)
            title(axes, f"{name}: {_in_short(timeline)}", look)
        all_axes[-1].set_xlabel(f"time in {unit}", color=look.foreground, fontsize=SIZE, labelpad=1)
        legend(figure, paints, look)
    return figure


def _in_short(timeline: Timeline) -> str:
    if not timeline.spans:
        return "nothing happened"
    return f"{format_seconds(timeline.makespan_s)}, bubble {100 * timeline.bubble_share:.0f} %"


def _rows(axes: Axes, timeline: Timeline, devices: Sequence[str], scale: float, room_in: float, theme: Theme) -> None:
    whole = axes.get_xlim()[1]
    per_in = whole / room_in
    zero_s, makespan_s = timeline.start_s, timeline.makespan_s  # each of them looks at all spans
    for row, device in enumerate(devices):
        axes.broken_barh([(0, makespan_s / scale)], (row + _WORK[0], _WORK[1]), facecolor=theme.idle)
        work = timeline.work_of(device)
        moves = [span for span in timeline.spans if span.device == device and span.op == TRANSFER]
        for spans, (offset, height) in ((moves, _MOVES), (work, _WORK)):
            for (op, wide), group in _groups(spans, scale, per_in).items():
                paint = paint_of(op)
                axes.broken_barh(
                    [
                        (
                            (span.start_s - zero_s) / scale,
                            max(span.duration_s / scale, _NARROWEST_IN * per_in),
                        )
                        for span in group
                    ],
                    (row + offset, height),
                    facecolor=paint.colour,
                    edgecolor=theme.edge,
                    linewidth=0.5 if wide else 0.0,
                    hatch=paint.hatch if wide else "",
                )
        several = len({span.stage for span in work} - {None}) > 1
        for span in work:
            _number(axes, span, (span.start_s - zero_s) / scale, scale, per_in, row, several)


def _groups(spans: Iterable[Span], scale: float, per_in: float) -> dict[tuple[str, bool], list[Span]]:
    """Spans that look alike: by op, and whether they are wide enough for an edge."""
    groups: dict[tuple[str, bool], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.op, span.duration_s / scale >= _EDGE_FROM_IN * per_in), []).append(span)
    return groups


def _number(axes: Axes, span: Span, start: float, scale: float, per_in: float, row: int, several: bool) -> None:
    if span.micro_batch is None:
        return
    room_in = span.duration_s / scale / per_in - 0.04
    if room_in < 0.05:  # not even one digit
        return
    text = str(span) if several else str(span.micro_batch)
    if text_width_in(text, SIZE - 1) > room_in:
        return
    where = (start + span.duration_s / scale / 2, row + _WORK[0] + _WORK[1] / 2)
    drawn = axes.text(*where, text, ha="center", va="center", fontsize=SIZE - 1, color=INK, parse_math=False)
    if paint_of(span.op).hatch:  # a number among the lines of a hatch is hard to read
        drawn.set_bbox({"facecolor": paint_of(span.op).colour, "edgecolor": "none", "pad": 1.2})


def _paints(timelines: Iterable[Timeline]) -> list[Paint]:
    """Those that occur, in the order in which they are known."""
    ops = {span.op for timeline in timelines for span in timeline.spans}
    return [paint_of(op) for op in (*(op for op in OPS if op in ops), *sorted(ops - {*OPS}))]
