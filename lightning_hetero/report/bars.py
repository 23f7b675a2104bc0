"""Stacked bars in percent: one row for each device, and a line where everything is full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_hetero.report.canvas import SIZE, Frame, figure_of_rows, legend, name_rows, settings, title
from lightning_hetero.report.theme import Paint, Theme, theme_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 0.62


@dataclass(frozen=True, slots=True)
class Bar:
    """A row.

    Attributes:
        name: To its left.
        value: To its right.
        parts: Lengths by what they are; 1 is full.
    """

    name: str
    value: str
    parts: Mapping[str, float] = field(default_factory=dict)


def stacked(name: str, bars: Sequence[Bar], paints: Mapping[str, Paint], theme: str | Theme) -> Figure:
    """Draw bars; of the paints those that occur are explained."""
    look = theme_named(theme)
    used = [paint for what, paint in paints.items() if any(bar.parts.get(what) for bar in bars)]
    with settings():
        frame = Frame.around([bar.name for bar in bars], [bar.value for bar in bars], used)
        figure, (axes,) = figure_of_rows(frame, [len(bars)], look)
        longest = max([1.0, *(sum(bar.parts.values()) for bar in bars)])
        axes.set_xlim(0, 100 * longest * (1.0 if longest == 1.0 else 1.02))
        name_rows(axes, [bar.name for bar in bars], [bar.value for bar in bars], look)
        for row, bar in enumerate(bars):
            axes.barh(row, 100, _HEIGHT, color=look.idle)
            left = 0.0
            for what, paint in paints.items():
                width = 100 * bar.parts.get(what, 0.0)
                if width:
                    style: dict[str, Any] = {
                        "color": paint.colour,
                        "hatch": paint.hatch,
                        "edgecolor": look.edge,
                        "linewidth": 0.5,
                    }
                    axes.barh(row, width, _HEIGHT, left=left, **style)
                left += width
        if longest > 1.0:
            axes.axvline(100, color=look.foreground, linewidth=1.0, linestyle="--")
        axes.set_xlabel("percent", color=look.foreground, fontsize=SIZE, labelpad=1)
        title(axes, name, look)
        if used:
            legend(figure, used, look)
    return figure
