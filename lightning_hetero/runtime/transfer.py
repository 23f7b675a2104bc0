"""Moves tensors, and whatever structures of tensors user code passes around, from device to device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.runtime import meter
from lightning_hetero.runtime.containers import Copied, inside, is_open

Visit = Callable[[Tensor], Tensor]
_VERSION = attrgetter("_version")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, differentiable; the tensor itself if it is there already.

    Two accelerators of different types go through host memory: which of the two backends would carry out a
    direct copy is not defined, and some crash on it.
    """
    if tensor.device == device:
        return tensor
    there = tensor
    if "cpu" not in (tensor.device.type, device.type) and tensor.device.type != device.type:
        there = tensor.to("cpu")
    there = there.to(device)
    for each in meter.running:
        each.count(there)
    return there


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place; tensors of inference mode do not count."""
    try:
        return tensor._version
    except RuntimeError:  # asked first, `is_inference` would let go of the interpreter, for other threads to take
        return 0


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """`version_of` all of these tensors."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return list(map(version_of, tensors))


def move(obj: Any, device: torch.device) -> Any:
    """`obj` with every tensor in it on `device`; `obj` itself if nothing had to move. See `map_tensors`.

    A tensor that stands in two places stays one tensor.
    """
    return map_tensors(obj, once(lambda tensor: to_device(tensor, device)), device)


def once(visit: Visit) -> Visit:
    """The same, but a tensor is visited once, though it stands in several places of a structure that lives on."""
    new_of: dict[int, Tensor] = {}

    def visit_once(tensor: Tensor) -> Tensor:
        new = new_of.get(id(tensor))
        if new is None:
            new_of[id(tensor)] = new = visit(tensor)
        return new

    return visit_once


def map_tensors(obj: Any, visit: Visit, device: torch.device, copied: list[Copied] | None = None) -> Any:
    """Replace the tensors inside lists, tuples, named tuples, mappings, dataclasses and objects with `.to`.

    Anything that holds no tensor to replace is returned as it is, by identity. Where something inside changes,
    the containers around it are copied, never changed in place: they belong to user code.

    Args:
        obj: Any structure.
        visit: Gives the replacement of a tensor; returning the tensor itself means "as it is".
        device: What objects with a `.to` method of their own are sent to.
        copied: Where to note the lists, mappings and dataclasses that are copied; None: nowhere.
    """
    if isinstance(obj, Tensor):
        return visit(obj)
    if obj is None or isinstance(obj, (str, bytes, int, float, bool, complex, torch.nn.Module)):
        return obj
    if isinstance(obj, dict):
        return _noted(obj, _map_dict(obj, visit, device, copied), copied)
    if isinstance(obj, (list, tuple)) and not hasattr(obj, "to"):
        return _noted(obj, _map_sequence(obj, visit, device, copied), copied)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return _noted(obj, _map_dataclass(obj, visit, device, copied), copied)
    if callable(getattr(obj, "to", None)) and not isinstance(obj, type):
        # PackedSequence, graph batches, BatchEncoding: they know best how to move themselves.
        return obj if getattr(obj, "device", None) == device else obj.to(device)
    return obj


def _noted(obj: Any, new: Any, copied: list[Copied] | None) -> Any:
    if copied is not None and new is not obj and is_open(obj):
        copied.append(Copied(obj, new, *inside(new), inside(obj)[1]))
    return new


def _map_dict(obj: dict[Any, Any], visit: Visit, device: torch.device, copied: list[Copied] | None) -> Any:
    new = {key: map_tensors(value, visit, device, copied) for key, value in obj.items()}
    if all(new[key] is value for key, value in obj.items()):
        return obj
    return with_values(obj, new)


def with_values(like: Any, values: dict[Any, Any]) -> Any:
    """A mapping of the same class with other values, under its keys and in attributes that hold the same."""
    if type(like) is dict:
        return values
    # A shallow copy keeps subclasses whole (OrderedDict, ModelOutput, defaultdict and its factory).
    result = copy.copy(like)
    for key, value in values.items():
        result[key] = value
    own = getattr(result, "__dict__", None)
    if own:
        new_of = {id(old): values[key] for key, old in dict.items(like) if key in values}
        for name, old in list(own.items()):
            if id(old) in new_of:
                own[name] = new_of[id(old)]
    return result


def _map_sequence(obj: Any, visit: Visit, device: torch.device, copied: list[Copied] | None) -> Any:
    new = [map_tensors(item, visit, device, copied) for item in obj]
    if all(after is before for after, before in zip(new, obj, strict=True)):
        return obj
    if hasattr(obj, "_fields"):
        return type(obj)(*new)
    return type(obj)(new)


def _map_dataclass(obj: Any, visit: Visit, device: torch.device, copied: list[Copied] | None) -> Any:
    changed = {}
    for field in dataclasses.fields(obj):
        before = getattr(obj, field.name, None)
        after = map_tensors(before, visit, device, copied)
        if after is not before:
            changed[field.name] = after
    if not changed:
        return obj
    # Not `dataclasses.replace`: that would run the user's __init__ and __post_init__ again.
    result = copy.copy(obj)
    for name, value in changed.items():
        object.__setattr__(result, name, value)
    return result
