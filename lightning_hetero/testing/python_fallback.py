"""Runs any operator of torch on a device of the Python backend, with the host's kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_hetero.testing.accelerator import NAME
from lightning_hetero.testing.python_device import PythonDevices, perf_counter
from lightning_hetero.testing.python_tensors import to_device, to_host

Operator = Any  # torch._ops.OpOverload

CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def overload(name: str) -> Any:
    """The operator `aten::<name>`, with its overload after a dot."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def on_device(value: object) -> bool:
    """Whether a value is a tensor of the emulated device type."""
    return isinstance(value, Tensor) and value.device.type == NAME


def host_kernel(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator on host tensors below autograd and autocast, which have done their part before."""
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return op(*args, **kwargs)


def set_memory(tensor: Tensor, memory: Tensor) -> None:
    """Let a device tensor have the memory and the shape of another one."""
    op = torch.ops.aten.set_.source_Storage_storage_offset
    op.redispatch(CPU_KEYS, tensor, memory.untyped_storage(), 0, memory.shape, memory.stride())


@dataclass
class _Twins:
    """A device tensor and the host tensor on the same memory."""

    device: Tensor
    host: Tensor
    begin: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.host.data_ptr()
        self.end = self.begin + self.host.untyped_storage().nbytes()

    def view_like(self, result: Tensor) -> Tensor:
        offset = self.device.storage_offset() + (result.data_ptr() - self.begin) // result.element_size()
        op = torch.ops.aten.as_strided.default
        view: Tensor = op.redispatch(CPU_KEYS, self.device, result.shape, result.stride(), offset)
        return view


class HostCall:
    """One call of one operator on its way to the host and back; see `cpp/fallback.h` for the idea."""

    def __init__(self, devices: PythonDevices, op: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.devices = devices
        self.op = op
        self.arguments = op._schema.arguments
        self.twins: list[_Twins] = []
        named = {argument.name: argument for argument in self.arguments}
        pairs = [*zip(self.arguments, args, strict=False), *((named[key], kwargs[key]) for key in kwargs)]
        self.index = self._find_device([value for _, value in pairs])
        self.args = [self._to_host(value, argument) for argument, value in pairs[: len(args)]]
        self.kwargs = {argument.name: self._to_host(value, argument) for argument, value in pairs[len(args) :]}
        self._set_generator()

    def run(self) -> Any:
        """Make the call, wait as long as the device is slower, and translate what came out."""
        start = perf_counter()
        result = host_kernel(self.op, *self.args, **self.kwargs)
        self.devices.finish_kernel(self.index, perf_counter() - start)
        self._take_back_grown_memory()
        return tree_map(self._to_device, result)

    def _find_device(self, values: list[Any]) -> int:
        tensors: list[Tensor] = []
        tree_map(lambda value: tensors.append(value) if on_device(value) else None, values)
        if tensors:
            return int(tensors[0].device.index)
        named = [v for v in values if isinstance(v, torch.device) and v.type == NAME and v.index is not None]
        return int(named[0].index) if named else self.devices.current_device()

    def _to_host(self, value: Any, argument: Any) -> Any:
        def one(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu") if leaf.type == NAME else leaf
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.device != torch.device(NAME, self.index):
                self._check_may_stay_on_host(leaf, argument)
                return leaf
            self.twins.append(_Twins(leaf, to_host(leaf)))
            return self.twins[-1].host

        return tree_map(one, value)

    def _check_may_stay_on_host(self, tensor: Tensor, argument: Any) -> None:
        written = argument.alias_info is not None and argument.alias_info.is_write
        number = tensor.device.type == "cpu" and tensor.dim() == 0 and not written
        index = tensor.device.type == "cpu" and argument.name == "indices" and "List" in str(argument.type)
        if not (number or index):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:{self.index} and {tensor.device}! (when checking argument for argument {argument.name} "
                f"in method {self.op._schema.name})"
            )

    def _set_generator(self) -> None:
        for position, argument in enumerate(self.arguments):
            if argument.name == "generator":
                own = self.devices.generator(self.index)
                if position < len(self.args):
                    self.args[position] = self.args[position] or own
                elif self.kwargs.get("generator") is None:
                    self.kwargs["generator"] = own

    def _take_back_grown_memory(self) -> None:
        for twins in self.twins:
            if twins.host.data_ptr() != twins.begin:
                set_memory(twins.device, to_device(self.devices, self.index, twins.host.clone()))

    def _to_device(self, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        for twins in self.twins:
            if twins.host is result:
                return twins.device
        for twins in self.twins:
            if result._is_view() and twins.begin <= result.data_ptr() < twins.end:
                return twins.view_like(result)
        return to_device(self.devices, self.index, result)
