"""The points of a sweep side by side: step time, metric, and those that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.report.canvas import (
    SIZE,
    Frame,
    figure_of_rows,
    legend,
    name_rows,
    save,
    settings,
    shown,
    title,
)
from lightning_hetero.report.theme import ORANGE, SKY, VERMILLION, Paint, Theme, theme_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURED, PREDICTED, METRIC = "measured_step_s", "predicted_step_s", "metric"
_PAINTS = {
    MEASURED: Paint("measured step", SKY),
    PREDICTED: Paint("predicted step", ORANGE, "////"),
}
_REASON_LENGTH = 90


def sweep_chart(rows: Sequence[Mapping[str, object]], *, theme: str | Theme = "light") -> Figure:
    """Draw the points of a sweep, one row each, in the order given.

    Args:
        rows: As `sweep.csv` has them, numbers or texts: `overrides`, `status` ("ok", or what happened), `reason` of a
            failure, `measured_step_s`, `predicted_step_s`, `metric`. All but the first may be empty or missing;
            other columns are ignored.
        theme: "light" or "dark".

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: There is no such theme.
    """
    look = theme_named(theme)
    names = [str(row.get("overrides", "")) or "(nothing)" for row in rows]
    times = [[_number(row, MEASURED), _number(row, PREDICTED)] for row in rows]
    metrics = [_number(row, METRIC) for row in rows]
    failures = [_failure(row) for row in rows]
    panels = 2 if any(metric is not None for metric in metrics) else 1
    with settings():
        used = [paint for index, paint in enumerate(_PAINTS.values()) if any(each[index] is not None for each in times)]
        values = [_fastest(each) for each in times]
        texts = ["" if metric is None else f"{metric:.4g}" for metric in metrics]
        frame = Frame.around(names, [*values, *texts], used)
        figure, all_axes = figure_of_rows(frame, [len(rows)] * panels, look)
        _panel(all_axes[0], "Step time", names, values, look)
        longest_s = max((s for each in times for s in each if s is not None), default=0.0) or 1.0
        scale, unit = (1e-3, "ms") if longest_s < 1 else (1.0, "s")
        all_axes[0].set_xlim(0, 1.02 * longest_s / scale)
        all_axes[0].set_xlabel(f"time in {unit}", color=look.foreground, fontsize=SIZE, labelpad=1)
        for row, (each, failure) in enumerate(zip(times, failures, strict=True)):
            _times(all_axes[0], row, each, scale, look)
            if failure is not None:
                _mark(all_axes[0], row, failure, look)
        if panels == 2:
            _panel(all_axes[1], "Metric", names, texts, look)
            for row, metric in enumerate(metrics):
                if metric is not None:
                    all_axes[1].plot([metric], [row], "o", color=SKY, markeredgecolor=look.foreground, markersize=6)
            all_axes[1].margins(x=0.05)
            all_axes[1].locator_params(axis="x", nbins=5)
        if used:
            legend(figure, used, look)
    return figure


def write_table_chart(rows: Sequence[Mapping[str, object]], path: str | Path, *, theme: str | Theme = "light") -> Path:
    """Write the chart of a sweep as PNG or SVG; see `sweep_chart` and `save`.

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: There is no such theme, another ending, or the file cannot be written.
    """
    return save(sweep_chart(rows, theme=theme), path)


def _panel(axes: Axes, name: str, names: Sequence[str], values: Sequence[str], theme: Theme) -> None:
    name_rows(axes, names, values, theme)
    title(axes, name, theme)
    for row in range(len(names)):
        axes.axhline(row + 0.5, color=theme.idle, linewidth=0.8, zorder=0)


def _times(axes: Axes, row: int, seconds: Sequence[float | None], scale: float, theme: Theme) -> None:
    """Two bars, or one where only one time is known."""
    known = [(key, value) for key, value in zip((MEASURED, PREDICTED), seconds, strict=True) if value is not None]
    height = 0.7 / max(1, len(known))
    for index, (key, value) in enumerate(known):
        paint = _PAINTS[key]
        y = row - 0.35 + height * (index + 0.5)
        style: dict[str, Any] = {"color": paint.colour, "hatch": paint.hatch, "edgecolor": theme.edge, "linewidth": 0.5}
        axes.barh(y, value / scale, height, **style)


def _mark(axes: Axes, row: int, failure: str, theme: Theme) -> None:
    """A cross at the beginning of the row, and the reason."""
    axes.plot([0.006], [row], "X", color=VERMILLION, transform=axes.get_yaxis_transform(), clip_on=False, markersize=7)
    axes.annotate(
        failure,
        (0.006, row),
        (8, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=theme.foreground,
        fontsize=SIZE,
        parse_math=False,
    )


def _failure(row: Mapping[str, object]) -> str | None:
    """What happened to a point that did not work, on one line."""
    status = str(row.get("status", "") or "ok")
    if status == "ok":
        return None
    text = ": ".join(part for part in (status, str(row.get("reason", "") or "")) if part)
    first = shown(text.splitlines()[0])
    return first if len(first) <= _REASON_LENGTH else f"{first[: _REASON_LENGTH - 1]}…"


def _number(row: Mapping[str, object], key: str) -> float | None:
    """A number of the row; None where there is none, or none that can be drawn."""
    try:
        value = float(str(row.get(key, "")))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _fastest(seconds: Sequence[float | None]) -> str:
    """The measured time, or else the predicted one, for people."""
    known = [value for value in seconds if value is not None]
    return format_seconds(known[0]) if known else ""
