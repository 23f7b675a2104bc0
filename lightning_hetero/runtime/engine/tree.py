"""Takes structures of tensors apart into a flat list, and puts them together again with other tensors."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.transfer import with_values

Build = Callable[[Sequence[Tensor]], Any]

# Values that hold no tensor, whatever else they are.
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.Size, torch.Generator, nn.Module,
)  # fmt: skip


_TENSOR: tuple[type, Any] = (Tensor, ())
_FIRST: Build = itemgetter(0)
# Attributes of tensors that are no business of user code: marks of this package and of torch.compile.
_MARKS = ("_hetero", "_dynamo")


class Tree:
    """A structure of lists, tuples, mappings and dataclasses, with the tensors taken out.

    Code may ask whether two tensors are one (`context is x`), and what it does to one of them in place it does to the
    other. So a tensor that stands in several places is taken out once, and its replacement goes to all of them.
    Attributes that user code has given to a tensor go over to its replacement.

    Args:
        obj: The structure. It is not changed.

    Attributes:
        tensors: The tensors in the order of their first places, each once.
        values: The other values in order, those in attributes of tensors among them; for a tensor that has stood
            before, a text that says which it is and where it stands again.
        form: Class and keys of every container, and where tensors are.
        has_containers: Whether there are lists, mappings or dataclasses.
        opaque: An object that may hold tensors out of sight; None if there is none.
    """

    __slots__ = ("_build", "_index_of", "form", "has_containers", "opaque", "tensors", "values")

    def __init__(self, obj: Any) -> None:
        self.tensors: list[Tensor] = []
        self._index_of: dict[int, int] = {}  # of tensors, by their `id`; made when somebody asks
        self.values: list[Any] = []
        self.form: list[tuple[type, Any]] = []
        self.opaque: Any = None
        self.has_containers = False
        # The commonest arguments, and outputs: every call of a unit makes two of these.
        if type(obj) is Tensor and not obj.__dict__:
            self.tensors.append(obj)
            self.form.append(_TENSOR)
            self._build: Build = _FIRST
        elif type(obj) is tuple and obj and _are_distinct(obj):
            self.tensors += obj
            self.form.append((tuple, len(obj)))
            self.form += [_TENSOR] * len(obj)
            self._build = tuple
        else:
            self._build = self._take(obj)

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        """That of `(args, kwargs)`, whose two containers nobody else has."""
        if kwargs or not _are_distinct(args):
            return cls((args, kwargs))
        tree = cls(())
        tree.tensors += args
        tree.form = [(tuple, 2), (tuple, len(args)), *[_TENSOR] * len(args), (dict, ())]
        tree._build = lambda new: (tuple(new), {})
        return tree

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """The structure with other tensors, as many as `tensors` and in their order; containers are new."""
        return self._build(tensors)

    def _take(self, obj: Any) -> Build:
        if isinstance(obj, Tensor):
            return self._take_tensor(obj)
        kind = type(obj)
        if isinstance(obj, dict):
            self.has_containers = True
            self.form.append((kind, tuple(obj)))
            fields = {key: self._take(value) for key, value in obj.items()}
            self._look_behind(obj, obj.values())
            return lambda new: with_values(obj, {key: value(new) for key, value in fields.items()})
        if kind is list or (isinstance(obj, tuple) and _makes_itself(kind)):
            self.has_containers = self.has_containers or kind is list
            self.form.append((kind, len(obj)))
            items = [self._take(item) for item in obj]
            return lambda new: _sequence(kind, [item(new) for item in items])
        if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
            values = {f.name: getattr(obj, f.name, None) for f in dataclasses.fields(obj)}
            self.has_containers = True
            self.form.append((kind, tuple(values)))
            members = {name: self._take(value) for name, value in values.items()}
            self._look_behind(obj, values.values())
            return lambda new: with_fields(obj, {name: value(new) for name, value in members.items()})
        self._take_value(obj)
        return lambda new: obj

    def _take_tensor(self, tensor: Tensor) -> Build:
        count = len(self.tensors)
        if len(self._index_of) < count:
            self._index_of = {id(known): index for index, known in enumerate(self.tensors)}
        index = self._index_of.setdefault(id(tensor), count)
        if index == count:
            self.tensors.append(tensor)
        else:
            self.values.append(f"tensor {index} at {len(self.form)}")
        own = attributes(tensor) if tensor.__dict__ else None
        if not own:
            self.form.append(_TENSOR)
            return itemgetter(index)
        self.form.append((Tensor, tuple(own)))
        for value in own.values():
            self._take_value(value)
        return lambda new: with_attributes(new[index], tensor)

    def _take_value(self, obj: Any) -> None:
        self.values.append(obj)
        if not isinstance(obj, _PLAIN) and not callable(obj):
            self.opaque = obj

    def _look_behind(self, obj: Any, seen: Iterable[Any]) -> None:
        """Whether a container of a class of its own has attributes beside what it contains."""
        if type(obj) is dict:
            return
        known = set(map(id, seen))
        if any(
            id(value) not in known and not isinstance(value, _PLAIN) for value in getattr(obj, "__dict__", {}).values()
        ):
            self.opaque = obj


def _are_distinct(objs: tuple[Any, ...]) -> bool:
    """Whether all are tensors, without attributes, and none of them stands in two places."""
    for obj in objs:
        if type(obj) is not Tensor or obj.__dict__:
            return False
    return len(objs) == 1 or len(set(map(id, objs))) == len(objs)


def attributes(tensor: Tensor) -> dict[str, Any]:
    """What user code has set on a tensor; stand-ins for its methods aside, which belong to this very tensor."""
    own = tensor.__dict__.items()
    return {name: each for name, each in own if not (name.startswith(_MARKS) or hasattr(Tensor, name))}


def with_attributes(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, with the attributes of another one that it stands for."""
    if tensor is not like and like.__dict__:
        tensor.__dict__.update(attributes(like))
    return tensor


def _makes_itself(kind: type) -> bool:
    """Whether it is tuple, a named tuple, or one of torch's own kind (what `max` returns)."""
    return kind is tuple or hasattr(kind, "_fields") or hasattr(kind, "n_sequence_fields")


def _sequence(kind: Any, items: list[Any]) -> Any:
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def with_fields(like: Any, values: dict[str, Any]) -> Any:
    """A dataclass of the same class with other values."""
    # Not `dataclasses.replace`: that would run the user's __init__ and __post_init__ again.
    result = copy.copy(like)
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result
