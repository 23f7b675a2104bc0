"""Devices by number, as plain PyTorch programs write them: `device_ids=[0, 1]` and a backend that says of what kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from lightning_hetero.devices.accelerators import torch_device_modules
from lightning_hetero.errors import InventoryError

# The process-group backends of torch name the devices that they are for; in one process nothing else of them is used.
_KIND_OF_BACKEND = {"nccl": "cuda", "gloo": "cpu", "mpi": "cpu", "xccl": "xpu", "hccl": "npu"}


def kind_of(backend: str | None) -> str | None:
    """The kind of device that a backend stands for; None for the current accelerator.

    Raises:
        InventoryError: There is no such backend.
    """
    if backend is None or backend == "auto":
        return None
    kinds = dict.fromkeys(["cpu", *torch_device_modules(), *_KIND_OF_BACKEND.values()])
    kind = _KIND_OF_BACKEND.get(backend, backend) if isinstance(backend, str) else ""
    if kind not in kinds:
        raise InventoryError(
            f"backend={backend!r} is neither a kind of device ({', '.join(kinds)}) nor a process-group backend for one "
            f"({', '.join(_KIND_OF_BACKEND)}). Write one of these, or leave it out for the current accelerator."
        )
    return kind


def requested(device_ids: Any, kind: str | None) -> Any:
    """The request for `resolve_devices` that numbers, texts and devices stand for.

    Args:
        device_ids: As in `ModelParallelConfig`.
        kind: As `kind_of` gives it.

    Raises:
        InventoryError: A number is no device here, or an entry is neither.
    """
    if device_ids is None or isinstance(device_ids, str):
        return device_ids
    if not isinstance(device_ids, Sequence):
        raise InventoryError(
            f"device_ids={device_ids!r} is not a list of devices. Write one, such as [0, 1, 'cpu'], or 'auto' for all "
            "devices; memory limits belong into memory=."
        )
    return [_entry(entry, kind) for entry in device_ids]


def name_of(device: Any, kind: str | None) -> Any:
    """The name of the device that a number means; anything else as it is.

    Raises:
        InventoryError: The number is negative, or there is no accelerator.
    """
    if isinstance(device, bool) or not isinstance(device, Integral):
        return device
    index = int(device)
    if index < 0:
        raise InventoryError(f"device {index} does not exist: devices are counted from 0")
    if kind is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            raise InventoryError(
                f"device {index} means accelerator number {index}, and this machine has none. Write 'cpu', or "
                "backend='cpu' to let the CPU play several devices."
            )
        kind = accelerator.type
    return f"{kind}:{index}"


def _entry(entry: Any, kind: str | None) -> Any:
    if isinstance(entry, bool) or not isinstance(entry, (Integral, str, torch.device, Mapping)):
        raise InventoryError(f"device_ids: {entry!r} is neither a number, nor a text, nor a torch.device")
    name = name_of(entry, kind)
    return {"name": name, "kind": "emulated"} if kind == "cpu" and isinstance(entry, Integral) else name
