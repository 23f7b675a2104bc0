"""Figures of matplotlib without its global state: nothing is registered, no window opens, no setting stays changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hetero.errors import TargetError, UsageError
from lightning_hetero.report.theme import PAGE_FOREGROUND, Paint, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 8.0
"""Of text, in points."""
WIDTH_IN = 10.0
"""Of a figure, in inches."""
ROW_IN = 0.36
"""Height of the row of one device, in inches."""
POINTS = 72.0
_NAME_LENGTH = 48
_SUFFIXES = (".png", ".svg")
_DPI = 110
_PER_LINE = 6  # paints explained in one line of a legend
_SETTINGS = {"svg.hashsalt": "lightning_hetero", "hatch.linewidth": 0.6, "font.size": SIZE}


def require_matplotlib() -> None:
    """Say early that pictures cannot be drawn here.

    Raises:
        TargetError: matplotlib is not installed.
    """
    with settings():
        pass


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib's own settings with ours, whatever the user has set.

    Raises:
        TargetError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise TargetError(
            f"pictures are drawn by matplotlib, which cannot be imported ({error}); "
            "install it with: pip install 'lightning-hetero[pictures]'"
        ) from error
    with style.context(["default", _SETTINGS]):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Room around the rows of a picture, in inches."""

    left: float
    right: float
    top: float = 0.42
    bottom: float = 0.6
    between: float = 0.55

    @classmethod
    def around(cls, names: Sequence[str], values: Sequence[str], paints: Sequence[Paint]) -> Frame:
        """With room for names on the left, values on the right, and below for an axis and what explains paints."""
        left, right = (max([*map(text_width_in, texts)], default=0.0) + 0.3 for texts in (names, values))
        return cls(left=left, right=right, bottom=0.5 + 0.19 * -(-len(paints) // _PER_LINE))


def figure_of_rows(
    frame: Frame, rows: Sequence[int], theme: Theme, width_in: float = WIDTH_IN
) -> tuple[Figure, list[Axes]]:
    """An empty figure with axes one below the other, as tall as they have rows."""
    from matplotlib.figure import Figure

    heights = [ROW_IN * max(1, count) for count in rows]
    total = sum(heights) + frame.top + frame.bottom + frame.between * (len(rows) - 1)
    width_in = max(width_in, frame.left + frame.right + 4.0)
    figure = Figure(figsize=(width_in, total), facecolor=theme.background)
    axes = []
    upper = total - frame.top
    for height in heights:
        box = (
            frame.left / width_in,
            (upper - height) / total,
            1 - (frame.left + frame.right) / width_in,
            height / total,
        )
        axes.append(plain(figure.add_axes(box), theme))
        upper -= height + frame.between
    return figure, axes


def plain(axes: Axes, theme: Theme) -> Axes:
    """The axes without a box, in the colours of the theme."""
    axes.set_facecolor("none")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=theme.foreground, length=2.5, width=0.6, labelsize=SIZE)
    return axes


def name_rows(axes: Axes, names: Sequence[str], values: Sequence[str], theme: Theme) -> None:
    """Write names to the left of the rows, from the top down, and values to the right."""
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.set_yticks([])
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        for x, text, side in ((-6, short(name), "right"), (6, value, "left")):
            axes.annotate(
                text,
                (0.0 if side == "right" else 1.0, row),
                (x, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha=side,
                va="center",
                color=theme.foreground,
                fontsize=SIZE,
                parse_math=False,
                annotation_clip=False,
            )


def title(axes: Axes, text: str, theme: Theme) -> None:
    """A line over the axes."""
    axes.set_title(text, loc="left", color=theme.foreground, fontsize=SIZE + 1.5, parse_math=False)


def legend(figure: Figure, paints: Sequence[Paint], theme: Theme) -> None:
    """Explain paints along the lower edge of the figure."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=paint.colour, hatch=paint.hatch, edgecolor=theme.edge, linewidth=0.5, label=shown(paint.label))
        for paint in paints
    ]
    found = figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=min(_PER_LINE, max(1, len(handles))),
        frameon=False,
        labelcolor=theme.foreground,
        fontsize=SIZE,
        handlelength=2.2,
        handleheight=1.1,
    )
    for text in found.get_texts():
        text.set_parse_math(False)


def text_width_in(text: str, size: float = SIZE) -> float:
    """How wide a text is, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(short(text), FontProperties(size=size), ismath=False)
    return float(width) / POINTS


def short(name: str) -> str:
    """A name that has room: the middle of a long one is left out, since names differ at their ends."""
    name = shown(name)
    if len(name) <= _NAME_LENGTH:
        return name
    half = (_NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def shown(text: str) -> str:
    """The text with what the font cannot draw replaced, and on one line."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(char if ord(char) in known and char.isprintable() else "□" for char in text)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file; equal figures are equal files.

    Args:
        figure: As a function of this package made it.
        path: Ends with ".png" or ".svg".

    Returns:
        The path.

    Raises:
        UsageError: Another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{str(path)!r} is no picture that can be written; end it with {' or '.join(_SUFFIXES)}")
    try:
        with settings():
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
            figure.savefig(path, dpi=_DPI, metadata=metadata)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error}; choose another path") from error
    return path


def as_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an element for a page of HTML: no foreign names, ids of its own, text in the page's colour.

    Args:
        figure: Drawn with the theme of pages.
        prefix: Of its ids; different for every figure of a page.
        label: What it shows, for people who do not see it; escaped already.
    """
    file = StringIO()
    with settings():
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    head, _, body = text.replace(PAGE_FOREGROUND, "currentColor").partition(">")
    view = re.search(r'viewBox="([^"]*)"', head)
    assert view is not None  # matplotlib always writes one
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{label}">{body}'
