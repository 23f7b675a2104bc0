"""Names of modules as users write them, and the units that they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph, Unit

REST = ("", "*")
"""Names that stand for the whole model."""


def covers(key: str, unit: Unit) -> bool:
    """Whether a name is that of the unit, of a module around it, or of everything."""
    return key in REST or any(name == key or name.startswith(f"{key}.") for name in (unit.name, *unit.aliases))


def longest(keys: Iterable[str], unit: Unit) -> str | None:
    """The most precise of the names that cover a unit; None if none does."""
    return max((key for key in keys if covers(key, unit)), key=lambda key: len(key.strip("*")), default=None)


def check_module_name(key: str, graph: ModelGraph, where: str) -> None:
    """Raise unless the name stands for some unit.

    Raises:
        PlacementError: It lies inside a unit, or there is nothing of that name; then the nearest names are listed.
    """
    if key in REST or any(covers(key, unit) for unit in graph.units):
        return
    inside = next((name for name in graph.names if key.startswith(f"{name}.")), None)
    if inside is not None:
        why = dict(graph.whole).get(inside, "it is one unit")
        raise PlacementError(
            f"{where}: {key!r} lies inside {inside!r}, which stays whole because {why}. Place {inside!r} instead."
        )
    names = sorted({".".join(n.split(".")[: i + 1]) for n in graph.names for i in range(n.count(".") + 1)})
    raise PlacementError(
        f"{where}: no unit is named {key!r} or lies below it.{did_you_mean(key, names)} "
        f"Units of this model: {listing(graph.names)}."
    )


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """A hint with the nearest known words, starting with a space; empty if none is near."""
    near = get_close_matches(word, list(known), n=count)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def listing(names: Iterable[str]) -> str:
    """The first six names in quotes, and how many more there are."""
    names = list(names)
    shown = ", ".join(map(repr, names[:6]))
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
