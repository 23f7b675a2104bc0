"""Installs the backend of the emulated accelerator that needs no compiler.

It does less than the C++ backend, because torch's own support for backends in Python does:

* It is slow, about 0.1 ms for each operator.
* torch believes that there is one device. So autograd runs on the thread that asks for a backward pass, and
  that thread must have run an operator on a device before. `torch.accelerator.set_device_index` is ignored,
  and `.to("dev")` without a number means `dev:0`; `torch.dev.set_device` and `torch.empty(device="dev")` work.
* An exception in the hook of a tensor ends the process during a backward pass.
* There is no pinned memory, no `torch.Generator(device="dev")`, no stream, no event and no memory statistics
  in `torch.accelerator`; those in `torch.dev` work. Random operators take a generator of the CPU.
* `torch.UntypedStorage(device="dev")` crashes. `torch.load` and `copy.deepcopy` have a way around it.
* An `out=` tensor with contents cannot grow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration

from lightning_hetero.errors import UsageError
from lightning_hetero.testing import python_autocast, recurrent
from lightning_hetero.testing.backend import NAME, Backend
from lightning_hetero.testing.device_module import DeviceModule, check_device_type_is_free
from lightning_hetero.testing.python_device import PythonDevices
from lightning_hetero.testing.python_fallback import on_device
from lightning_hetero.testing.python_kernels import Kernels
from lightning_hetero.testing.python_tensors import to_device, to_host

_libraries: list[torch.library.Library] = []  # a kernel lives as long as its library


def install(count: int) -> Backend:
    """Register `count` devices with torch.

    Args:
        count: Number of devices, 1 to 64.

    Raises:
        UsageError: Another device type is registered, or this torch does not support backends in Python.
    """
    check_device_type_is_free(NAME)
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        raise UsageError(
            f"torch {torch.__version__} has no support for backends written in Python. Install a newer torch, or a C++ "
            "compiler and take install_accelerator('cpp')."
        )
    devices = PythonDevices(count)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=DeviceModule(NAME, devices))
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    Kernels(devices).register(everything, aten)
    python_autocast.register(everything, aten)
    _libraries.extend((everything, aten))
    recurrent.register()
    _make_storages_work(devices)
    return devices


def _make_storages_work(devices: PythonDevices) -> None:
    """Keep `torch.load` and `copy.deepcopy` from asking for an allocator, which a Python backend cannot have."""

    def copy_of(storage: torch.UntypedStorage, index: int) -> torch.UntypedStorage:
        memory = torch.empty(storage.nbytes(), dtype=torch.uint8)
        if storage.nbytes():
            alias = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            memory.copy_(to_host(alias) if on_device(alias) else alias)
        return to_device(devices, index, memory).untyped_storage()

    def tag(storage: Any) -> str | None:
        return f"{NAME}:{storage.device.index}" if storage.device.type == NAME else None

    def restore(storage: Any, location: Any) -> torch.UntypedStorage | None:
        if not isinstance(location, str) or location.partition(":")[0] != NAME:
            return None
        index = torch.device(location).index
        return copy_of(storage, devices.current_device() if index is None else index)

    def clone(storage: torch.UntypedStorage) -> Any:
        if storage.device.type == NAME:
            return copy_of(storage, storage.device.index)
        return original_clone(storage)  # type: ignore[no-untyped-call]

    original_clone = torch.UntypedStorage.clone
    torch.UntypedStorage.clone = clone  # type: ignore[assignment,method-assign]
    torch.serialization.register_package(5, tag, restore)  # before torch's own, which is 10 and more
