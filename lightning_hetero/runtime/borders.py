"""The hooks at the borders of placed modules: inputs come in to the module's device, outputs go back to the root.

They are ordinary module hooks, so `copy.deepcopy` and pickling of a placed module work, and the copy is placed
like its original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.containers import write_back
from lightning_hetero.runtime.frames import Frame, Seeded
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import map_tensors, move, once, to_device

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class EnterBlock(Hook):
    """Before the `forward` of a module that lies on one device: its inputs move there."""

    device: torch.device

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Forward pre-hook."""
        frame = Frame(id(module), self.device)
        if module.training and self.device.type != "cpu" and _may_be_checkpointed():
            frame.seeded = _seed_from_cpu(self.device)
        copies: dict[int, Tensor] = {}

        def visit(tensor: Tensor) -> Tensor:
            if tensor.device == self.device:
                return tensor
            if id(tensor) not in copies:  # one tensor passed twice arrives as one tensor
                copies[id(tensor)] = copy = _carry_in(tensor, self.device)
                frame.moved.append((tensor, copy, copy._version))
            return copies[id(tensor)]

        new_args = map_tensors(args, visit, self.device, frame.copied)
        new_kwargs = map_tensors(kwargs, visit, self.device, frame.copied)
        frame.copied = [entry for entry in frame.copied if entry.given is not kwargs]
        frames.push(frame)
        return None if new_args is args and new_kwargs is kwargs else (new_args, new_kwargs)


@dataclass(frozen=True)
class LeaveBlock(Hook):
    """After the `forward` of a module that lies on one device: its outputs go where control goes."""

    root: torch.device

    def __call__(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Forward hook, called after an exception too (then `output` is None)."""
        frame = frames.pop(id(module))
        if frame is None:
            return None
        if frame.seeded is not None:
            _unseed_if_unused(frame.device, frame.seeded)
        _write_back(frame)
        if frame.copied:
            write_back(frame.copied, lambda value: move(value, self.root))
        given_of = {id(copy): given for given, copy, _ in frame.moved}
        around = frames.top()
        if around is not None and around.chain:
            return None  # the next link of the chain fetches it
        home = self.root

        def visit(tensor: Tensor) -> Tensor:
            # An input that is handed through comes back as the very tensor that was given.
            given = given_of.get(id(tensor))
            return to_device(tensor, home) if given is None or given.device != home else given

        new = map_tensors(output, once(visit), home)
        return None if new is output else new


@dataclass(frozen=True)
class EnterSplit(Hook):
    """Before the `forward` of a module whose parts lie on several devices; its own code computes on the root.

    Args:
        root: The root device.
        chain: Whether its `forward` is that of nn.Sequential, which no user code sees into: then what one part
            returns goes straight to the next.
    """

    root: torch.device
    chain: bool

    def __call__(self, module: nn.Module, args: Args) -> None:
        """Forward pre-hook."""
        frames.push(Frame(id(module), self.root, self.chain))


@dataclass(frozen=True)
class LeaveSplit(Hook):
    """After the `forward` of a split module: its outputs go back to the root."""

    root: torch.device

    def __call__(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Forward hook, called after an exception too (then `output` is None)."""
        frames.pop(id(module))
        around = frames.top()
        if around is not None and around.chain:
            return None
        new = move(output, self.root)
        return None if new is output else new


def enters_by(module: nn.Module) -> torch.device | None:
    """Where `EnterBlock` brings the inputs of a module; None if it has no such hook."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, EnterBlock):
            return hook.device
    return None


def leaves_by(module: nn.Module) -> torch.device | None:
    """Where `LeaveBlock` brings the outputs of a module; None if it has no such hook."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, LeaveBlock):
            return hook.root
    return None


def _carry_in(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of an input that can tell whether it was changed in place: tensors of inference mode cannot."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return to_device(tensor, device)
    return to_device(tensor, device)


def _write_back(frame: Frame) -> None:
    """What the module did to its inputs in place (nn.ReLU(inplace=True)) must be seen by who passed them."""
    for given, copy, version in frame.moved:
        if copy._version != version:
            given.copy_(copy)


def _may_be_checkpointed() -> bool:
    """Whether this may be the forward of activation checkpointing, or its repetition in the backward."""
    if frames.are_random_numbers_arranged() or torch.compiler.is_dynamo_compiling():  # which cannot trace the next
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:  # as in torch.export: no values
        return False
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or not torch.is_grad_enabled()
        or torch._C._current_graph_task_id() != -1
    )


def _seed_from_cpu(device: torch.device) -> Seeded:
    """Let the random numbers of a device follow from those of the CPU.

    `torch.utils.checkpoint` repeats the random numbers of the CPU and of the devices on which its inputs are. A block
    may be on another device; without this its dropout would draw another mask in the repetition, and gradients would
    be wrong without an error.
    """
    backend, which = getattr(torch, device.type), _which(device)
    before = torch.get_rng_state(), backend.get_rng_state(*which)
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    if device.index is None or not hasattr(backend, "device"):
        backend.manual_seed(seed)
    else:
        with backend.device(device):
            backend.manual_seed(seed)
    return Seeded(*before, torch.get_rng_state(), backend.get_rng_state(*which))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """How functions for random numbers are told the device: there is one MPS device, and its functions know that."""
    return () if device.type == "mps" else (device,)


def _unseed_if_unused(device: torch.device, seeded: Seeded) -> None:
    """Leave random numbers as they were if a block has drawn none: to run without gradients is no reason for others."""
    backend, which = getattr(torch, device.type), _which(device)
    with torch._C.DisableTorchFunction():
        if torch.equal(backend.get_rng_state(*which), seeded.device_then):
            backend.set_rng_state(seeded.device_before, *which)
            if torch.equal(torch.get_rng_state(), seeded.cpu_then):
                torch.set_rng_state(seeded.cpu_before)
