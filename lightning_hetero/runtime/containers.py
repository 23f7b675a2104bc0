"""Lists, mappings and dataclasses among arguments: what a module writes into them, done to the caller's.

A module may append to a list that it is given (the losses of a mixture of experts), or fill a mapping (a cache). Where
its inputs move to another device, it gets copies of such containers, and what it writes has to reach the originals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

Contents = list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]]


class Copied(NamedTuple):
    """A container that was copied, because something in it moved.

    Attributes:
        given: The caller's.
        copy: What the module got.
        keys: Keys of the copy as it was made; of a list, none.
        values: Its values likewise.
        originals: The caller's values, one for each.
    """

    given: Any
    copy: Any
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    originals: tuple[Any, ...]


def is_open(obj: Any) -> bool:
    """Whether it is a container that somebody may write into."""
    return isinstance(obj, (list, dict)) or (dataclasses.is_dataclass(obj) and not isinstance(obj, type))


def inside(obj: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Keys and values of an open container."""
    if isinstance(obj, dict):
        return tuple(dict.keys(obj)), tuple(dict.values(obj))
    if isinstance(obj, list):
        return (), tuple(list.__iter__(obj))
    names = tuple(field.name for field in dataclasses.fields(obj))
    return names, tuple(getattr(obj, name, None) for name in names)


def contents(obj: Any) -> Contents:
    """All open containers in a structure, with what is in them."""
    found: Contents = []
    todo, seen = [obj], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        if isinstance(value, tuple):
            todo += value
        elif is_open(value):
            seen.add(id(value))
            keys, values = inside(value)
            found.append((value, keys, values))
            todo += values
    return found


def are_unchanged(found: Contents) -> bool:
    """Whether there is in all containers what there was."""
    return all(_same(inside(obj), (keys, values)) for obj, keys, values in found)


def write_back(copied: list[Copied], home: Callable[[Any], Any]) -> None:
    """Do to the caller's containers what was done to the copies.

    Args:
        copied: The copies.
        home: Brings a new value to where the caller's code computes.
    """
    for given, copy, keys, values, originals in copied:
        now_keys, now = inside(copy)
        if _same((now_keys, now), (keys, values)):
            continue
        known = {id(value): original for value, original in zip(values, originals, strict=True)}
        back = [known[id(value)] if id(value) in known else home(value) for value in now]
        if isinstance(given, list):
            given[:] = back
        elif isinstance(given, dict):
            for key in [key for key in given if key not in now_keys]:
                del given[key]
            for key, value in zip(now_keys, back, strict=True):
                if key not in given or given[key] is not value:
                    given[key] = value
        else:
            for name, value, before, after in zip(now_keys, back, values, now, strict=True):
                if before is not after:
                    object.__setattr__(given, name, value)


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    (keys, values), (other_keys, other_values) = one, other
    return (
        len(values) == len(other_values)
        and keys == other_keys
        and all(a is b for a, b in zip(values, other_values, strict=True))
    )
