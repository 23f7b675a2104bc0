"""Replicas of placed modules on other devices: copies of the parameters, and twins of the modules that use them.

The parameters of a replicated module belong to one device, its owner. Other devices hold copies, which are refreshed
before a call if the originals have changed. Gradients of copies are summed up where they arise and come home once for a
call; optimizers, checkpoints and hooks know the originals only.

A twin is a new object of a module's class with the same attributes and hooks, and with the copies in the place of
parameters and buffers, as in `torch.nn.parallel.replicate`. Twins are made anew for every call, so they
are what the module is at that moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_hetero.runtime.borders import EnterBlock
from lightning_hetero.runtime.emulate import EnterEmulated, LeaveEmulated, Pace
from lightning_hetero.runtime.engine.twin import twin_of
from lightning_hetero.runtime.guard import StayPlaced
from lightning_hetero.runtime.hooks import HOOKS
from lightning_hetero.runtime.standin import StandIn
from lightning_hetero.runtime.transfer import to_device, version_of

_CALL = "_compiled_call_impl"
_SMALL = 4096


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot have replicas; None if it can."""
    for name, part in module.named_modules():
        where = name or type(module).__name__
        if isinstance(part, torch.jit.ScriptModule):
            return f"{where} is a TorchScript module"
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            return f"{where} was compiled by torch.compile"
        if not isinstance(part.__dict__.get("forward"), (StandIn, type(None))):
            return f"the method forward of {where} was replaced for this very object"
        if any(map(is_lazy, _tensors(part))):
            return f"{where} is lazy and has no parameters yet"
    return None


@dataclass
class _Copy:
    """A tensor on another device, and the state of the original when it was made."""

    tensor: Tensor
    version: int
    address: int
    print: Tensor
    written: int  # version of the copy itself after it was made


class Copies:
    """The parameters and buffers that one device has copies of.

    Args:
        device: The device.

    Attributes:
        home: The original, by `id` of the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.home: dict[int, Tensor] = {}
        self._copies: dict[int, tuple[Tensor, _Copy]] = {}  # by `id` of the original, which is kept alive here

    def refresh(self, originals: Iterable[Tensor]) -> None:
        """Have copies of these tensors as they are now, and of no others.

        A change through `tensor.data` leaves no trace in the tensor's version. So originals that seem unchanged are
        compared by sums, which reads them and moves nothing.
        """
        copies: dict[int, tuple[Tensor, _Copy]] = {}
        with torch.inference_mode(False), torch.no_grad():
            for original in originals:
                if id(original) not in copies:
                    copies[id(original)] = original, self._renewed(original)
        self._copies = copies
        # Made anew: the `id` of a copy that is gone may be that of another tensor by now.
        self.home = {id(copy.tensor): original for original, copy in copies.values()}

    def of(self, original: Tensor) -> Tensor:
        """The copy of a tensor."""
        return self._copies[id(original)][1].tensor

    def changed(self, originals: Iterable[Tensor]) -> bool:
        """Whether somebody wrote to one of the copies."""
        copies = (self._copies[id(original)][1] for original in originals)
        return any(version_of(copy.tensor) != copy.written for copy in copies)

    def _renewed(self, original: Tensor) -> _Copy:
        """The copy of a tensor, as it is now.

        What a graph that still waits for its backward has saved of the copy is treated as it would be with the
        original: a change that autograd knows of makes that backward fail, one through `data` reaches it, and with
        another tensor as `data` it keeps the old one.
        """
        _, copy = self._copies.get(id(original), (original, None))
        if copy is None or not _fits(copy.tensor, original):
            return self._made(original)
        copy.tensor.requires_grad_(original.requires_grad)
        if original.layout != torch.strided:
            return copy if version_of(original) == copy.version else self._made(original)
        if _address(original) != copy.address:
            copy.tensor.data = self._moved(original)
        elif version_of(original) != copy.version:
            copy.tensor.copy_(self._source(original))
        elif not torch.equal(_print_of(original), copy.print):
            copy.tensor.data.copy_(self._source(original))
        else:
            return copy
        return _noted(copy.tensor, original)

    def _made(self, original: Tensor) -> _Copy:
        tensor = self._moved(original)
        if isinstance(original, nn.Parameter):
            # A class of user code stays what it is; a parameter of a subclass of Tensor is no object of Parameter.
            cls = type(original) if issubclass(type(original), nn.Parameter) else None
            tensor = nn.Parameter(tensor, False) if cls is None else torch.Tensor._make_subclass(cls, tensor)
        tensor.__dict__.update(original.__dict__)
        return _noted(tensor.requires_grad_(original.requires_grad), original)

    def _moved(self, original: Tensor) -> Tensor:
        tensor = to_device(original.detach(), self.device)
        return tensor.clone() if original.device == self.device else tensor  # emulated devices share the CPU

    def _source(self, original: Tensor) -> Tensor:
        """What to copy from: accelerators of different types are not asked to read each other's memory."""
        kinds = {original.device.type, self.device.type}
        return original if len(kinds) == 1 or "cpu" in kinds else original.to("cpu")


def _noted(tensor: Tensor, original: Tensor) -> _Copy:
    return _Copy(tensor, version_of(original), _address(original), _print_of(original), version_of(tensor))


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _print_of(tensor: Tensor) -> Tensor:
    """Some numbers that a change of the tensor changes: all of a small one; of a large one, its sums along two axes.

    Sums along both, so that it shows if rows or columns have changed places.
    """
    if tensor.layout != torch.strided:
        return torch.empty(0)
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    flat = values.reshape(-1)
    if len(flat) <= _SMALL:
        return flat.clone()
    finest = torch.float64 if values.device.type in ("cpu", "cuda") else torch.float32
    dtype = torch.promote_types(values.dtype, finest) if values.is_floating_point() else torch.int64
    side = isqrt(len(flat))
    square, rest = flat[: side * side].view(side, side), flat[side * side :]
    return torch.cat((square.sum(0, dtype=dtype), square.sum(1, dtype=dtype), rest.to(dtype)))


def _fits(copy: Tensor, original: Tensor) -> bool:
    return (copy.shape, copy.dtype, copy.layout) == (original.shape, original.dtype, original.layout)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


class Seat:
    """One replica of some modules.

    Args:
        modules: The modules.
        copies: What is copied to its device.
        pace: How the device works, if it is emulated.

    Attributes:
        copies: See above.
        twins: The modules on this device.
    """

    def __init__(self, modules: Sequence[nn.Module], copies: Copies, pace: Pace) -> None:
        self.copies = copies
        self.twins: list[nn.Module] = []
        self._modules = modules
        self._pace = pace
        self._made: list[tuple[nn.Module, dict[str, Any]]] = []

    def originals(self) -> Iterator[Tensor]:
        """What has to be copied; a tensor may come twice."""
        for module in self._modules:
            for part in module.modules():
                yield from _tensors(part)

    def renew(self) -> None:
        """Make twins of the modules as they are now. Nothing may begin to run on the replica at the same time."""
        known: dict[int, nn.Module] = {}
        twins = [self._twin(module, known) for module in self._modules]
        for twin in twins:
            _move_hooks(twin, self.copies.device, self._pace)
        self._made = [(twin, _state(twin)) for twin in known.values()]
        self.twins = twins

    def home(self, leaf: Tensor) -> Tensor:
        """The original of a leaf of a graph; the leaf itself if it is none of the copies."""
        return self.copies.home.get(id(leaf), leaf)

    @property
    def has_changed_buffers(self) -> bool:
        """Whether its run has written to buffers since it was made: such a change is lost."""
        parts = (part for module in self._modules for part in module.modules())
        return self.copies.changed(buffer for part in parts for buffer in part._buffers.values() if buffer is not None)

    @property
    def lost(self) -> str | None:
        """An attribute that its run has set, as twins are made anew for every call; None if there is none."""
        for twin, before in self._made:
            now = _state(twin)
            for name in {**before, **now}:
                if now.get(name, self) is not before.get(name, self):
                    return f"the attribute {name!r} of {type(twin).__name__}"
        return None

    def _twin(self, module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
        if id(module) in known:
            return known[id(module)]
        twin = twin_of(module, {})
        known[id(module)] = twin
        own = twin.__dict__
        for name, value in module.__dict__.items():
            if name == _CALL or isinstance(value, (StayPlaced, StandIn)):
                del own[name]
        own["_parameters"] = {name: self._of(tensor) for name, tensor in module._parameters.items()}
        own["_buffers"] = {name: self._of(tensor) for name, tensor in module._buffers.items()}
        own["_modules"] = {
            name: None if child is None else self._twin(child, known) for name, child in module._modules.items()
        }
        if isinstance(twin, nn.RNNBase):  # it keeps a list of its weights
            twin._init_flat_weights()
        return twin

    def _of(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else self.copies.of(tensor)


def _state(twin: nn.Module) -> dict[str, Any]:
    return {**twin.__dict__, **twin._parameters, **twin._buffers, **twin._modules}


def _move_hooks(twin: nn.Module, device: torch.device, pace: Pace) -> None:
    """Let this package's hooks on a twin mean its own device."""
    instead: Mapping[type, Any] = {
        EnterBlock: lambda: EnterBlock(device),
        EnterEmulated: lambda: EnterEmulated(pace),
        LeaveEmulated: lambda: LeaveEmulated(pace),
    }
    for name in HOOKS:
        hooks = getattr(twin, name).copy()
        for key, hook in hooks.items():
            if type(hook) in instead:
                hooks[key] = instead[type(hook)]()
        twin.__dict__[name] = hooks
