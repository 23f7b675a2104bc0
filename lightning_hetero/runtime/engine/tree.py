"""Takes structures of tensors apart into a flat list, and puts them together again with other tensors."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[Sequence[Tensor]], Any]

# Values that hold no tensor, whatever else they are.
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.Size, torch.Generator, nn.Module,
)  # fmt: skip


class Tree:
    """A structure of lists, tuples, mappings and dataclasses, with the tensors taken out.

    Args:
        obj: The structure. It is not changed.

    Attributes:
        tensors: The tensors in order; one that stands in two places occurs twice.
        values: The other values in order.
        opaque: An object of a class unknown here that may hold tensors out of sight; None if there is none.
    """

    __slots__ = ("_build", "opaque", "tensors", "values")

    def __init__(self, obj: Any) -> None:
        self.tensors: list[Tensor] = []
        self.values: list[Any] = []
        self.opaque: Any = None
        self._build: Build = self._take(obj)

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The structure with other tensors, in the order of `tensors`; containers are new."""
        return self._build(tensors)

    def _take(self, obj: Any) -> Build:
        if isinstance(obj, Tensor):
            index = len(self.tensors)
            self.tensors.append(obj)
            return itemgetter(index)
        kind = type(obj)
        if kind is tuple and all(type(item) is Tensor for item in obj):  # the commonest arguments, and outputs
            first, self.tensors = len(self.tensors), [*self.tensors, *obj]
            last = len(self.tensors)
            return lambda new: tuple(new[first:last])
        if kind is dict and not obj:
            return lambda new: {}
        if kind is tuple or kind is list:
            items = [self._take(item) for item in obj]
            return lambda new: kind([item(new) for item in items])
        if isinstance(obj, dict):
            fields = {key: self._take(value) for key, value in obj.items()}
            return lambda new: with_values(obj, {key: value(new) for key, value in fields.items()})
        if isinstance(obj, tuple) and hasattr(obj, "_fields"):
            parts = [self._take(item) for item in obj]
            return lambda new: _named_tuple(kind, [part(new) for part in parts])
        if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
            members = {f.name: self._take(getattr(obj, f.name, None)) for f in dataclasses.fields(obj)}
            return lambda new: with_fields(obj, {name: value(new) for name, value in members.items()})
        self.values.append(obj)
        if not isinstance(obj, _PLAIN) and not callable(obj):
            self.opaque = obj
        return lambda new: obj


def with_values(like: Any, values: dict[Any, Any]) -> Any:
    """A mapping of the same class with other values."""
    if type(like) is dict:
        return values
    # A shallow copy keeps subclasses whole (OrderedDict, ModelOutput, defaultdict and its factory).
    result = copy.copy(like)
    for key, value in values.items():
        result[key] = value
    return result


def _named_tuple(kind: Any, items: list[Any]) -> Any:
    return kind(*items)


def with_fields(like: Any, values: dict[str, Any]) -> Any:
    """A dataclass of the same class with other values."""
    # Not `dataclasses.replace`: that would run the user's __init__ and __post_init__ again.
    result = copy.copy(like)
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result
