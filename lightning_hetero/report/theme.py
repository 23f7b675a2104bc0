"""Colours and hatches of pictures: Okabe and Ito's palette, told apart without colour too, on light and dark ground."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.errors import UsageError
from lightning_hetero.schedule import TRANSFER

# Okabe & Ito, "Color Universal Design", 2008: distinct for every common form of colour blindness.
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
INK = "#000000"
"""Of text on these colours; every one of them is light enough for it."""


@dataclass(frozen=True, slots=True)
class Theme:
    """What is around the colours.

    Attributes:
        background: Of the picture; "none" is transparent.
        foreground: Of text and axes.
        idle: Of rows where nothing happens.
        edge: Of boxes.
    """

    background: str
    foreground: str
    idle: str
    edge: str


PAGE_FOREGROUND = "#010203"
"""Stands for the colour of a page's text, which is known only where the page is shown."""
THEMES = {
    "light": Theme("#FFFFFF", "#1A1A1A", "#ECECEC", "#FFFFFF"),
    "dark": Theme("#16181C", "#E8E8E8", "#2C3036", "#16181C"),
}
PAGE = Theme("none", PAGE_FOREGROUND, "#8884", "#303030")


@dataclass(frozen=True, slots=True)
class Paint:
    """How one kind of thing is drawn."""

    label: str
    colour: str
    hatch: str = ""


OPS = {
    "F": Paint("forward", SKY),
    "B": Paint("backward", ORANGE, "//"),
    "I": Paint("input gradient", ORANGE, "////"),
    "W": Paint("weight gradient", YELLOW, "\\\\\\\\"),
    "own": Paint("own code, loss", GREY, "...."),
    "optimizer": Paint("optimizer", GREEN, "xxxx"),
    TRANSFER: Paint("transfer", PURPLE, "----"),
}
"""By the op of a span."""
MEMORY = {
    "parameters": Paint("parameters", SKY),
    "gradients": Paint("gradients", ORANGE, "////"),
    "optimizer": Paint("optimizer state", GREEN, "xxxx"),
    "buffers": Paint("buffers", GREY, "...."),
    "activations": Paint("activations, predicted", YELLOW, "\\\\\\\\"),
}
"""By what fills a device."""


def paint_of(op: str) -> Paint:
    """The paint of an op; words that nobody knows share one."""
    return OPS.get(op) or Paint(op, VERMILLION, "++++")


def theme_named(name: str | Theme) -> Theme:
    """The theme "light" or "dark".

    Raises:
        UsageError: There is no such theme.
    """
    if isinstance(name, Theme):
        return name
    if name not in THEMES:
        raise UsageError(f"theme={name!r} is not known; write {' or '.join(map(repr, THEMES))}")
    return THEMES[name]
