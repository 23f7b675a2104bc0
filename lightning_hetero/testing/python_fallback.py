"""Runs any operator of torch on a device of the Python backend, with the host's kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.testing.backend import NAME
from lightning_hetero.testing.python_device import PythonDevices, perf_counter
from lightning_hetero.testing.python_tensors import to_device, to_host

Operator = Any  # torch._ops.OpOverload

CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def overload(name: str) -> Operator:
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
    _lay_out(tensor, memory.untyped_storage(), memory)


def _lay_out(tensor: Tensor, storage: torch.UntypedStorage, like: Tensor) -> None:
    """Let a device tensor lie on `storage` as `like` lies on its own."""
    op = overload("set_.source_Storage_storage_offset")
    op.redispatch(CPU_KEYS, tensor, storage, like.storage_offset(), like.shape, like.stride())


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([function(one) for one in value])
    return function(value)


@dataclass
class _Twins:
    """A device tensor and the host tensor on the same memory."""

    device: Tensor
    host: Tensor
    written: bool  # the operator may change it, its shape included

    def __post_init__(self) -> None:
        self.address = self.host.data_ptr()
        self.layout = (self.host.shape, self.host.stride())


class HostCall:
    """One call of one operator on its way to the host and back; see `cpp/fallback.h` for the idea."""

    def __init__(self, devices: PythonDevices, op: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.devices = devices
        self.op = op
        self.twins: dict[int, _Twins] = {}  # by the identity of the device tensor
        arguments = op._schema.arguments
        named = {argument.name: argument for argument in arguments}
        self._choose_device([*args, *kwargs.values()])
        self.args = [self._to_host(value, argument) for value, argument in zip(args, arguments, strict=False)]
        if "generator" in named and named["generator"] not in arguments[: len(args)]:
            kwargs = {"generator": None, **kwargs}
        self.kwargs = {name: self._to_host(value, named[name]) for name, value in kwargs.items()}

    def run(self) -> Any:
        """Make the call, wait as long as the device is slower, and translate what came out."""
        start = perf_counter()
        result = host_kernel(self.op, *self.args, **self.kwargs)
        self.devices.finish_kernel(self.index, perf_counter() - start)
        self._take_back_changes()
        return _map(self._to_device, result)

    def _choose_device(self, values: list[Any]) -> None:
        """Take the device of the tensors; else the one that the call names; else the current one."""
        leaves = [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else [value])]
        self.tensor = next((leaf for leaf in leaves if on_device(leaf)), None)
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type == NAME]
        named = self.tensor.device if self.tensor is not None else devices[0] if devices else torch.device(NAME)
        self.index = self.devices.current_device() if named.index is None else named.index

    def _to_host(self, value: Any, argument: Any) -> Any:
        written = argument.alias_info is not None and argument.alias_info.is_write

        def one(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("cpu") if leaf.type == NAME else leaf
            if isinstance(leaf, (int, float, complex)):
                return self._tensor_if_needed(leaf, argument)
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.device != torch.device(NAME, self.index):
                self._check_may_stay_on_host(leaf, argument, written)
                return leaf
            # An argument that is given twice is one tensor on the host too: kernels ask for that to take shortcuts.
            twins = self.twins.setdefault(id(leaf), _Twins(leaf, to_host(leaf), written))
            twins.written |= written
            return twins.host

        if argument.name == "generator":
            return self.devices.generator(self.index) if value is None else value
        return _map(one, value)

    def _tensor_if_needed(self, number: complex, argument: Any) -> complex | Tensor:
        """Undo what torch did on the way here: it turned the tensors of one number into plain numbers."""
        name = self.op._schema.name.removeprefix("aten::")
        if "Tensor" not in str(argument.type) or torch._C._should_allow_numbers_as_tensors(name):
            return number
        return torch.tensor(number, dtype=None if self.tensor is None else torch.result_type(self.tensor, number))

    def _check_may_stay_on_host(self, tensor: Tensor, argument: Any, written: bool) -> None:
        """The rules of CUDA: numbers may be read from the host, and so may index tensors."""
        number = tensor.device.type == "cpu" and tensor.dim() == 0 and not written
        index = tensor.device.type == "cpu" and argument.name == "indices" and "List" in str(argument.type)
        if not (number or index):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:{self.index} and {tensor.device}! (when checking argument for argument {argument.name} "
                f"in method {self.op._schema.name})"
            )

    def _take_back_changes(self) -> None:
        """Follow an operator that gave an argument more memory or another shape, as `out=` tensors get."""
        for twins in self.twins.values():
            host = twins.host
            if host.data_ptr() != twins.address:
                set_memory(twins.device, to_device(self.devices, self.index, host.clone()))
            elif twins.written and (host.shape, host.stride()) != twins.layout:
                _lay_out(twins.device, twins.device.untyped_storage(), host)

    def _to_device(self, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        for twins in self.twins.values():
            if twins.host is result:
                return twins.device
        if result.layout is not torch.strided:
            raise NotImplementedError(
                f"Could not run '{self.op._schema.name}' on {NAME}:{self.index}: its result is {result.layout}, and "
                "emulated devices have dense tensors only"
            )
        return to_device(self.devices, self.index, result)
