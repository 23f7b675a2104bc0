"""Moves tensors, and whatever structures of tensors user code passes around, from device to device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Visit = Callable[[Tensor], Tensor]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, differentiable; the tensor itself if it is there already.

    Two accelerators of different types go through host memory: which of the two backends would carry out a
    direct copy is not defined, and some crash on it.
    """
    if tensor.device == device:
        return tensor
    if "cpu" not in (tensor.device.type, device.type) and tensor.device.type != device.type:
        tensor = tensor.to("cpu")
    return tensor.to(device)


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def move(obj: Any, device: torch.device) -> Any:
    """`obj` with every tensor in it on `device`; `obj` itself if nothing had to move. See `map_tensors`."""
    return map_tensors(obj, lambda tensor: to_device(tensor, device), device)


def map_tensors(obj: Any, visit: Visit, device: torch.device) -> Any:
    """Replace the tensors inside lists, tuples, named tuples, mappings, dataclasses and objects with `.to`.

    Anything that holds no tensor to replace is returned as it is, by identity. Where something inside changes,
    the containers around it are copied, never changed in place: they belong to user code.

    Args:
        obj: Any structure.
        visit: Gives the replacement of a tensor; returning the tensor itself means "as it is".
        device: What objects with a `.to` method of their own are sent to.
    """
    if isinstance(obj, Tensor):
        return visit(obj)
    if obj is None or isinstance(obj, (str, bytes, int, float, bool, complex, torch.nn.Module)):
        return obj
    if isinstance(obj, dict):
        return _map_dict(obj, visit, device)
    if isinstance(obj, (list, tuple)) and not hasattr(obj, "to"):
        return _map_sequence(obj, visit, device)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return _map_dataclass(obj, visit, device)
    if callable(getattr(obj, "to", None)) and not isinstance(obj, type):
        # PackedSequence, graph batches, BatchEncoding: they know best how to move themselves.
        return obj if getattr(obj, "device", None) == device else obj.to(device)
    return obj


def _map_dict(obj: dict[Any, Any], visit: Visit, device: torch.device) -> dict[Any, Any]:
    new = {key: map_tensors(value, visit, device) for key, value in obj.items()}
    if all(new[key] is value for key, value in obj.items()):
        return obj
    # A shallow copy keeps subclasses whole (OrderedDict, ModelOutput, defaultdict and its factory).
    result = copy.copy(obj)
    for key, value in new.items():
        result[key] = value
    return result


def _map_sequence(obj: Any, visit: Visit, device: torch.device) -> Any:
    new = [map_tensors(item, visit, device) for item in obj]
    if all(after is before for after, before in zip(new, obj, strict=True)):
        return obj
    if hasattr(obj, "_fields"):
        return type(obj)(*new)
    return type(obj)(new)


def _map_dataclass(obj: Any, visit: Visit, device: torch.device) -> Any:
    changed = {}
    for field in dataclasses.fields(obj):
        before = getattr(obj, field.name, None)
        after = map_tensors(before, visit, device)
        if after is not before:
            changed[field.name] = after
    if not changed:
        return obj
    # Not `dataclasses.replace`: that would run the user's __init__ and __post_init__ again.
    result = copy.copy(obj)
    for name, value in changed.items():
        object.__setattr__(result, name, value)
    return result
