"""What a user writes to have a module spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_hetero.placement import PlacementPolicy


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig:
    """What `ModelParallel` needs to know.

    Attributes:
        model: The module to spread. Its parameters stay the same objects.
        device_ids: Where to spread it, in order; the first is where inputs are taken and outputs returned. A number
            is a device of the current accelerator, a text anything that `lightning_hetero.resolve_devices` reads
            ("cuda:1", "cpu", "cpu@speed=0.5"). None takes every device of this machine. Devices that the placement
            does not need, because the model has fewer parts, stay idle.
        backend: Kind of device that numbers mean: "cuda", "xpu", "cpu" (every number then is the CPU playing one
            more device), or the name of a process-group backend for such devices ("nccl", "gloo"). None or "auto"
            means the current accelerator.
        placement: Name of a placement policy, a mapping of module name to device, or a policy object.
        torchscript: Compile each part with `torch.jit.script` after it was placed. Deprecated by PyTorch, kept for the
            way to LibTorch.
        memory: Memory limits by device, such as {"cuda:1": "10GiB"} or {1: "10GiB"}.
        no_split: Names or classes of modules that have to stay whole.
        micro_batches: How many parts a batch is cut into, so that the devices work on different parts at the same
            time, wherever that changes nothing; 1 does not cut. Together with `torchscript` some parameters on an
            accelerator may be new objects after `close`; a warning then names them.
        optimizer_factor: Bytes of optimizer state for each byte of parameter, for the check of memory; Adam has 2.
    """

    model: nn.Module
    device_ids: Sequence[int | str | torch.device] | str | None = None
    backend: str | None = None
    placement: str | Mapping[str, int | str | torch.device] | PlacementPolicy = "even"
    torchscript: bool = False
    memory: Mapping[int | str | torch.device, int | str] | None = None
    no_split: str | Sequence[str] = ()
    micro_batches: int = 1
    optimizer_factor: float = 2.0
