"""Reads plain JSON types into dataclasses, strictly: each field has the type that the class says, or it is an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")


def types_of(cls: type[Any]) -> dict[str, Any]:
    """The types of the fields of a dataclass, by name."""
    key: Any = cls  # mypy takes the hash of instances for that of classes
    return _types_of(key)


@cache
def _types_of(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def read_record(
    cls: type[_Record],
    data: object,
    *,
    optional: Collection[str] = (),
    readers: Mapping[str, Callable[[Any], Any]] | None = None,
) -> _Record:
    """Make a dataclass of a mapping.

    Args:
        cls: The class. Its fields are texts, whole numbers from 0 below 2^63, finite numbers from 0, true or false,
            other such classes, tuples of any length of one of these, or any of these or None.
        data: What JSON had.
        optional: Fields that may be missing, and have their defaults then.
        readers: How fields are read of which the class does not say it all, by name.

    Raises:
        TypeError: A value has another type, or there is a field that the class does not have.
        KeyError: A field is missing.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"expected the fields of a {cls.__name__}, got {data!r}")
    types = types_of(cls)
    extra = next((name for name in data if name not in types), None)
    if extra is not None:
        raise TypeError(f"a {cls.__name__} has no field {extra!r}")
    readers = readers or {}
    values = {
        name: readers[name](data[name]) if name in readers else _read(kind, data[name])
        for name, kind in types.items()
        if name in data or name not in optional
    }
    return cls(**values)


def _read(kind: Any, value: object) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_LARGE:
        return value
    if kind is float and isinstance(value, float) and 0 <= value < math.inf:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOO_LARGE:
        return float(value)
    if is_dataclass(kind) and isinstance(kind, type):
        return read_record(kind, value, optional=getattr(kind, "LATER_FIELDS", ()))
    if isinstance(kind, UnionType):
        some = next(part for part in get_args(kind) if part is not NoneType)
        return None if value is None else _read(some, value)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(get_args(kind)[0], item) for item in value)
    raise TypeError(f"expected {_WORDS.get(kind, 'a list')}, got {_shortened(repr(value))}")


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


_TOO_LARGE = 2**63  # for bytes and parameters of anything, and for torch
_MOST_CHARACTERS = 80
_WORDS: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number >= 0 below 2^63",
    float: "a finite number >= 0",
}
