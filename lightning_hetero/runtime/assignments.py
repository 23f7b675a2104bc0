"""Lets `parameter.data = value` leave a placed parameter on its device, as an average of weights or a vector is set.

torch would take the parameter to the device of the value, or refuse where the two devices store tensors differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from lightning_hetero.runtime.transfer import to_device

_MODELS: list[Callable[[], nn.Module | None]] = []  # of the runs that go on


@contextmanager
def kept_beside(model: Callable[[], nn.Module | None]) -> Iterator[None]:
    """Within the block, parameters and buffers of a model stay where they are, whatever is assigned to `.data`.

    Args:
        model: Gives the model; asked only where an assignment would move a tensor.
    """
    _MODELS.append(model)
    try:
        yield
    finally:
        _MODELS.remove(model)


def beside(tensor: Tensor, value: Any, setter: FrameType | None) -> Any:
    """What to assign to `tensor.data` in the place of `value`: on the tensor's device, if it has to stay there.

    Args:
        tensor: Whose data are set.
        value: To what.
        setter: The frame of Python that does it.
    """
    if not isinstance(value, Tensor) or value.device == tensor.device or setter is None:
        return value
    if setter.f_code is vector_to_parameters.__code__:
        return to_device(value, tensor.device)  # it is said to copy
    if value.untyped_storage().nbytes() > value.nbytes:
        return value  # a part of something larger, which is to be changed together; a copy would not be
    if setter.f_globals.get("__name__", "").startswith("lightning_hetero."):
        return value
    if not torch._has_compatible_shallow_copy_type(tensor, value) or _is_placed(tensor):
        return to_device(value, tensor.device)
    return value


def _is_placed(tensor: Tensor) -> bool:
    models = [model for get in _MODELS if (model := get()) is not None]
    return any(tensor is own for model in models for own in chain(model.parameters(), model.buffers()))
