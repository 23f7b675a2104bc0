"""The timeline as people see it in a terminal: one row for each device, time from left to right."""

from __future__ import annotations

from lightning_hetero.schedule.timeline import TRANSFER, Span, Timeline

IDLE, MOVING, GOING_ON = "·", "~", "─"


def draw(timeline: Timeline, *, width: int = 64) -> str:
    """Draw what every device does, and the share of the time that it works.

    `F0──` is a forward of micro-batch 0, with the stage before it on devices that run several; `·` is idle, and
    `~` idle while tensors move. Where a label has no room its number is left out, never cut.

    Args:
        timeline: What to draw.
        width: Columns for the time, at least 1.

    Example:
        >>> from lightning_hetero.schedule import Span, Timeline
        >>> forward = Span(device="cpu", op="F", micro_batch=0, start_s=0, duration_s=1)
        >>> backward = Span(device="cpu", op="B", micro_batch=0, start_s=2, duration_s=2)
        >>> print(draw(Timeline((forward, backward)), width=12))
        cpu  F0─···B0────   75 %
        4 s, bubble 25 %
    """
    name_width = max(map(len, timeline.devices), default=0)
    rows = [
        f"{device.ljust(name_width)}  {_row(timeline, device, width)}  {100 * share:3.0f} %"
        for device, share in timeline.utilisation.items()
    ]
    return "\n".join([*rows, f"{_seconds(timeline.makespan_s)}, bubble {100 * timeline.bubble_share:.0f} %"])


def _row(timeline: Timeline, device: str, width: int) -> str:
    work = timeline.work_of(device)
    several = len({span.stage for span in work} - {None}) > 1
    cells = [IDLE] * width
    moves = [span for span in timeline.spans if span.device == device and span.op == TRANSFER]
    for span in (*moves, *work):  # work is painted over transfers
        begin, end = _columns(timeline, span, width)
        cells[begin:end] = MOVING * (end - begin) if span.op == TRANSFER else _label(span, end - begin, several)
    return "".join(cells)


def _columns(timeline: Timeline, span: Span, width: int) -> tuple[int, int]:
    """The columns that a span fills; at least one, so that nothing vanishes unless a later span begins there."""
    begin, end = (
        round((time_s - timeline.start_s) / timeline.makespan_s * width) if timeline.makespan_s else 0
        for time_s in (span.start_s, span.end_s)
    )
    begin = min(begin, width - 1)
    return begin, max(end, begin + 1)


def _label(span: Span, room: int, with_stage: bool) -> str:
    short = span.op[:1].upper()
    number = "" if span.micro_batch is None else span.micro_batch
    stage = span.stage if with_stage and span.stage is not None else ""
    full = f"{stage}{short}{number}"
    return (full if len(full) <= room else short).ljust(room, GOING_ON)


def _seconds(value_s: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value_s * factor >= 1 or not value_s:
            return f"{value_s * factor:.3g} {unit}"
    return f"{value_s * 1e6:.3g} us"
