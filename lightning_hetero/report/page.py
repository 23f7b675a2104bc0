"""Pieces of a page of HTML. Everything that comes from users is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING

from lightning_hetero.report.canvas import as_svg, settings
from lightning_hetero.report.theme import PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_SHAPES = 1500  # in a drawing by shapes; with more of them one by pixels is smaller
_DPI = 120


def page(name: str, parts: Iterable[str]) -> str:
    """A whole page that needs nothing else."""
    style = files("lightning_hetero.report").joinpath("style.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(name)}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def heading(name: str) -> str:
    """The beginning of a section."""
    return f"<h2>{escape(name)}</h2>"


def paragraph(text: str, faint: bool = False) -> str:
    """One paragraph."""
    kind = ' class="faint"' if faint else ""
    return f"<p{kind}>{escape(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, which can be moved sideways where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def code(text: str) -> str:
    """Text as it is typed."""
    return f"<pre>{escape(text)}</pre>"


def folded(name: str, content: str) -> str:
    """Content that is shown when somebody asks for it."""
    return f"<details><summary>{escape(name)}</summary>\n{content}\n</details>"


def picture(name: str, prefix: str, shapes: int, draw: Callable[..., Figure]) -> str:
    """A picture in the colours of the page, by shapes, or by pixels where there are too many shapes.

    Args:
        name: What it shows, for people who do not see it.
        prefix: Of its ids, different for every picture of a page.
        shapes: About how many there are.
        draw: Draws it in the `theme` that it is given.
    """
    label = escape(name)
    if shapes <= _MOST_SHAPES:
        return f"<figure>{as_svg(draw(theme=PAGE), prefix, label)}</figure>"
    dark, light = (_png(draw(theme=theme)) for theme in ("dark", "light"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{label}"></picture></figure>'
    )


def _png(figure: Figure) -> str:
    file = BytesIO()
    with settings():
        figure.savefig(file, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
