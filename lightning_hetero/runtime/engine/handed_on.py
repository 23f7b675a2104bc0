"""Methods such as `self.log` that a model gave to its parts, where a replacement has to look for them, too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

_MISSING = object()


class Place(NamedTuple):
    """Where a method stands.

    Attributes:
        owner: The module that has it; a weak reference, as the method may hold the whole model.
        key: Its name there.
        method: Its name as a method.
    """

    owner: weakref.ref[nn.Module]
    key: str
    method: str


def own_places(modules: Iterable[nn.Module], names: Sequence[str]) -> list[Place]:
    """Where modules have methods of these names, unless user code has put something else there."""
    return [
        Place(weakref.ref(module), name, name)
        for module in {id(module): module for module in modules}.values()
        for name in names
        if hasattr(type(module), name) and name not in module.__dict__
    ]


def places_below(root: nn.Module, names: Sequence[str]) -> list[Place]:
    """Attributes of a module, and of those below it, that are methods of these names of some module."""
    return [
        Place(weakref.ref(module), key, name)
        for module in root.modules()
        for key, value in module.__dict__.items()
        if (name := _method_in(value)) in names and name is not None
    ]


def _method_in(value: Any) -> str | None:
    while isinstance(value, partial):
        value = value.func
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return str(getattr(value.__func__, "__name__", None))
    return None


@contextmanager
def replaced(places: Sequence[Place], make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    """Within the block, something else stands there.

    Args:
        places: Where.
        make: Gives what is to stand there, by the name of the method.
    """
    owners = [(owner.__dict__, place) for place in places if (owner := place.owner()) is not None]
    before = [(attributes, place.key, attributes.get(place.key, _MISSING)) for attributes, place in owners]
    for (attributes, place), (_, _, method) in zip(owners, before, strict=True):
        attributes[place.key] = _with_arguments_of(method, make(place.method))
    try:
        yield
    finally:
        for attributes, key, method in before:
            if method is _MISSING:
                attributes.pop(key, None)
            else:
                attributes[key] = method


def _with_arguments_of(method: Any, other: Callable[..., Any]) -> Callable[..., Any]:
    return partial(other, *method.args, **method.keywords) if isinstance(method, partial) else other
