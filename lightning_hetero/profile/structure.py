"""Walks the structures of tensors that are passed to modules and returned by them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import PackedSequence

Visit = Callable[[Tensor], Tensor]
_PLAIN = (str, bytes, int, float, bool, complex, type, torch.dtype, torch.device, torch.Size, type(None))


def keep(obj: Any) -> Any:
    """Keep what holds no tensor as it is, by reference."""
    return obj


def own_copy(obj: Any) -> Any:
    """A deep copy of what user code may change, such as a cache of keys and values; functions stay what they are."""
    return copy.deepcopy(obj)


def map_tensors(obj: Any, visit: Visit, other: Callable[[Any], Any] = keep) -> Any:
    """A new structure with `visit` of every tensor in lists, tuples, named tuples, mappings and dataclasses.

    Args:
        obj: Any structure. It is never changed.
        visit: Gives what stands in the tensor's place. It is called in a fixed order.
        other: Gives what stands in the place of an object that is none of these and no plain value.
    """
    if isinstance(obj, Tensor):
        return visit(obj)
    if isinstance(obj, _PLAIN):
        return obj
    if isinstance(obj, PackedSequence):  # its batch sizes are on the CPU always, and no data
        data, order, back = (
            None if part is None else visit(part) for part in (obj.data, obj.sorted_indices, obj.unsorted_indices)
        )
        return PackedSequence(data, obj.batch_sizes, order, back)  # type: ignore[arg-type]
    if isinstance(obj, dict):
        new = copy.copy(obj)  # keeps subclasses whole: OrderedDict, ModelOutput, defaultdict and its factory
        for key, value in obj.items():
            new[key] = map_tensors(value, visit, other)
        return new
    if type(obj) in (list, tuple) or hasattr(obj, "_fields"):
        items = [map_tensors(item, visit, other) for item in obj]
        return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        # Not `dataclasses.replace`, which would run the user's __post_init__ again.
        twin: Any = copy.copy(obj)
        for field in dataclasses.fields(obj):
            if hasattr(obj, field.name):
                object.__setattr__(twin, field.name, map_tensors(getattr(obj, field.name), visit, other))
        return twin
    return other(obj)


def all_tensors(obj: Any) -> list[Tensor]:
    """The tensors of a structure in the order of `map_tensors`; one that is there twice comes twice."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(obj, visit)
    return found


def all_visible(obj: Any) -> list[Tensor] | None:
    """The tensors of a structure, each one once, as they stand there; None if some may be out of sight.

    That is in objects of other classes, and tensors without a shape. Nothing is built anew.
    """
    found: dict[int, Tensor] = {}
    todo = [obj]
    while todo:
        each = todo.pop()
        if isinstance(each, Tensor):
            if each.is_nested:
                return None
            found[id(each)] = each
        elif isinstance(each, dict):
            todo += reversed(dict.values(each))
        elif isinstance(each, (list, tuple)):
            todo += reversed(each)
        elif dataclasses.is_dataclass(each) and not isinstance(each, type):
            todo += [getattr(each, field.name, None) for field in reversed(dataclasses.fields(each))]
        elif not isinstance(each, (*_PLAIN, torch.nn.Module)):
            return None
    return [*found.values()]


def has_values(tensor: Tensor) -> bool:
    """Whether it is neither a meta nor a fake tensor."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def tensors_in(obj: Any) -> list[Tensor]:
    """The tensors of a structure, each one once."""
    return list({id(tensor): tensor for tensor in all_tensors(obj)}.values())
