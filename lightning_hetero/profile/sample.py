"""One call of a unit, kept so that it can be repeated with the unit alone; and which units are of one sort."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.profile.flows import TensorSpec
from lightning_hetero.profile.structure import all_tensors, has_values, map_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The arguments of one call. Their values are kept, because token ids and masks must stay legal.

    Attributes:
        unit: Name of the unit that was called.
        args: Its positional arguments, tensors as detached copies on the CPU, all else by reference.
        kwargs: Its keyword arguments likewise.
        inputs: What the tensors looked like, in the order of `map_tensors`.
        outputs: What came back; empty until the call ended.
        autocast: The dtype of autocast at that time, if it was on.
    """

    unit: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, unit: str, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None) -> Sample:
        """Copy the arguments of a call."""
        return cls(
            unit=unit,
            args=map_tensors(args, _host_copy),
            kwargs=map_tensors(kwargs, _host_copy),
            inputs=tuple(map(TensorSpec.of, all_tensors((args, kwargs)))),
            autocast=autocast,
        )


def sort_of_module(module: nn.Module) -> str:
    """A text that is equal for modules which compute the same with other values."""
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if not nn.parameter.is_lazy(tensor)
    ]
    modes = [inner.training for inner in module.modules()]
    return f"{type(module).__module__}.{type(module).__qualname__}|{module!r}|{tensors}|{modes}"


def sort_of_call(sort: str, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None) -> str:
    """Key of a sort of module together with what a call passes to it: shapes, dtypes and plain values."""
    specs = [TensorSpec.of(tensor) for tensor in all_tensors((args, kwargs))]
    plain = map_tensors((args, kwargs), _no_values, type)
    return hashlib.sha256(f"{sort}|{plain}|{specs}|{autocast}".encode()).hexdigest()[:16]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device, if it is on."""
    try:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    except RuntimeError:  # device types without autocast
        return None


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy that shares nothing with the original and holds no graph."""
    with torch.no_grad():
        tensor = tensor.detach()
        return tensor.to("cpu", copy=True) if has_values(tensor) else tensor.clone()


def _no_values(tensor: Tensor) -> Tensor:
    return torch.empty(0, device="meta")
