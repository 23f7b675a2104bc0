"""The operators of the Python backend that need more than the fallback: allocation, copies, views, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.testing.backend import NAME
from lightning_hetero.testing.python_attention import attention
from lightning_hetero.testing.python_device import PythonDevices, perf_counter
from lightning_hetero.testing.python_fallback import (
    CPU_KEYS,
    HostCall,
    host_kernel,
    on_device,
    overload,
    set_memory,
)
from lightning_hetero.testing.python_tensors import to_device, to_host

_aten = torch.ops.aten

# Kernels of the host that touch sizes, strides and storage only, and so are right for any device.
_SHAPE_KERNELS = (
    "view",
    "as_strided",
    "_reshape_alias",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
)


def _names_of_host_kernels() -> list[str]:
    """Operators for which torch has a kernel for the host and a generic one, which may round or lay out differently."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    generic = ("CompositeExplicitAutogradNonFunctional", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    names = [
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        if name.startswith("aten::") and any(has(name, key) for key in generic)
    ]
    return ["convolution", "convolution_backward", *names]  # generic for the host too, but they look at the device


class Kernels:
    """Kernels for the devices in `devices`."""

    def __init__(self, devices: PythonDevices) -> None:
        self._devices = devices

    def register(self, everything: torch.library.Library, aten: torch.library.Library) -> None:
        """Register all kernels.

        Args:
            everything: Library of the namespace `_`.
            aten: Library of the namespace `aten`.
        """
        everything.fallback(self.fallback, "PrivateUse1")
        own: dict[str, Callable[..., Any]] = {
            "empty.memory_format": self.empty,
            "empty_strided": self.empty_strided,
            "_efficientzerotensor": self.efficient_zero_tensor,
            "resize_": self.resize_,
            "_to_copy": self.to_copy,
            "_copy_from": self.copy_from,
            "_local_scalar_dense": self.local_scalar_dense,
            "native_dropout": self.native_dropout,
            "record_stream": lambda tensor, stream: None,  # kernels end before their calls return
            **{name: _shape_kernel(overload(name)) for name in _SHAPE_KERNELS},
            **{name: self._host_kernel(overload(name)) for name in _names_of_host_kernels()},
        }
        for name, kernel in own.items():
            aten.impl(name, kernel, "PrivateUse1")
        for key in ("Conjugate", "Negative"):  # else torch would ask for a copy before the copy, for ever
            aten.impl("_copy_from", torch.library.fallthrough_kernel, key)
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            aten.impl("scaled_dot_product_attention", attention, key)

    def fallback(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run any operator."""
        return HostCall(self._devices, op, args, kwargs).run()

    def empty(
        self,
        size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> Tensor:
        """`aten::empty`."""
        host = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
        return to_device(self._devices, self._index(device), host)

    def empty_strided(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
    ) -> Tensor:
        """`aten::empty_strided`."""
        host = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        return to_device(self._devices, self._index(device), host)

    def efficient_zero_tensor(self, size: Sequence[int], **options: Any) -> Tensor:
        """A tensor without memory that stands for zeros; autograd makes them. Here they are ordinary zeros."""
        return torch.zeros(size, **options)

    def resize_(self, tensor: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
        """`aten::resize_`; what fits of the old contents is kept."""
        old, old_numel, numel = tensor.untyped_storage(), tensor.numel(), math.prod(size)
        needed = tensor.storage_offset() + numel
        if needed * tensor.element_size() <= old.nbytes():
            stride = torch.empty(size, device="meta").stride()
            op = _aten.set_.source_Storage_storage_offset
            op.redispatch(CPU_KEYS, tensor, old, tensor.storage_offset(), size, stride)
            return tensor
        host = torch.empty(size, dtype=tensor.dtype, device="cpu")
        if old_numel:
            host.view(-1)[:old_numel].copy_(host_kernel(_aten.reshape.default, to_host(tensor), (-1,)))
        set_memory(tensor, to_device(self._devices, tensor.device.index, host))
        return tensor

    def to_copy(
        self,
        tensor: Tensor,
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> Tensor:
        """The kernel behind `.to`, without torch's detour through pinned memory, which this backend lacks.

        Device types that know nothing of this memory, such as `lazy`, get a copy on the host.
        """
        memory_format = memory_format or torch.preserve_format
        if device is not None and device.type not in (NAME, "cpu", "meta"):
            return tensor.cpu().to(device, dtype, memory_format=memory_format)
        copy = torch.empty_like(tensor, dtype=dtype, device=device, memory_format=memory_format)
        return copy.copy_(tensor)

    def copy_from(self, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """The kernel behind `copy_`, and so behind `.to`, `.cpu()` and `.clone()`."""
        size_bytes = source.numel() * source.element_size()
        if source.device != target.device:
            if on_device(source):
                counter = "d2d_bytes" if on_device(target) else "d2h_bytes"
                self._devices.cross_link(counter, source.device.index, size_bytes)
            if on_device(target):
                counter = "" if on_device(source) else "h2d_bytes"
                self._devices.cross_link(counter, target.device.index, size_bytes)
        start = perf_counter()
        host_source, host_target = (to_host(t) if on_device(t) else t for t in (source, target))
        host_kernel(_aten.copy_.default, host_target, host_source)
        if source.device == target.device:
            self._devices.finish_kernel(source.device.index, perf_counter() - start)
        return target

    def local_scalar_dense(self, tensor: Tensor) -> Any:
        """The kernel behind `.item()`: one number travels to the host."""
        self._devices.cross_link("d2h_bytes", tensor.device.index, tensor.element_size())
        return host_kernel(_aten._local_scalar_dense.default, to_host(tensor))

    def native_dropout(self, tensor: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        """`aten::native_dropout`, which draws from the device's generator."""
        if train is False:
            return tensor.clone(), torch.ones_like(tensor, dtype=torch.bool)
        keep = 1.0 - p
        mask = torch.empty_like(tensor, dtype=torch.bool).bernoulli_(keep)
        return tensor.mul(mask).mul_(1.0 / keep if keep else 0.0), mask

    def _index(self, device: torch.device | None) -> int:
        index = None if device is None else torch.device(device).index
        return self._devices.current_device() if index is None else int(index)

    def _host_kernel(self, op: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.fallback(op, *args, **kwargs)


def _shape_kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: op.redispatch(CPU_KEYS, *args, **kwargs)
