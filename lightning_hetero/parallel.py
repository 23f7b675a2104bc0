"""`ModelParallel`: the same placement for a plain PyTorch loop, without Lightning.

Follows the interface of the article "Heterogeneous computing with PyTorch": a configuration names the model and the
devices, `ModelParallel(config)` is a module to train like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import InventoryError, UsageError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, PlacementPolicy, Problem, get_policy, make_plan
from lightning_hetero.plan import Plan, check_plan
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import PlacedModel
from lightning_hetero.runtime.script import script_blocks
from lightning_hetero.runtime.transfer import move

# The process-group backends of torch name the devices that they are for; in one process nothing else of them is used.
_KIND_OF_BACKEND = {"nccl": "cuda", "gloo": "cpu", "mpi": "cpu", "xccl": "xpu", "hccl": "npu"}


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig:
    """What `ModelParallel` needs to know.

    Attributes:
        model: The module to spread. Its parameters stay the same objects.
        device_ids: Where to spread it, in order; the first is where inputs are taken and outputs returned. A number
            is a device of the current accelerator, a text anything that `lightning_hetero.resolve_devices` reads
            ("cuda:1", "cpu", "cpu@speed=0.5"). None takes every device of this machine.
        backend: Kind of device that numbers mean: "cuda", "xpu", "cpu" (every number then is the CPU playing one
            more device), or the name of a process-group backend for such devices ("nccl", "gloo"). None or "auto"
            means the current accelerator.
        placement: Name of a placement policy, a mapping of module name to device, or a policy object.
        torchscript: Compile each part with `torch.jit.script` after it was placed. Deprecated by PyTorch, kept for the
            way to LibTorch.
        memory: Memory limits by device, such as {"cuda:1": "10GiB"}.
        no_split: Names or classes of modules that have to stay whole.
        optimizer_factor: Bytes of optimizer state for each byte of parameter, for the check of memory; Adam has 2.
    """

    model: nn.Module
    device_ids: Sequence[int | str | torch.device] | None = None
    backend: str | None = None
    placement: str | Mapping[str, str | int] | PlacementPolicy = "even"
    torchscript: bool = False
    memory: Mapping[str, int | str] | None = None
    no_split: Sequence[str] = ()
    optimizer_factor: float = 2.0


class ModelParallel(nn.Module):
    """A module that runs with its parts on several devices and takes and returns tensors on the first of them.

    Outputs, losses and gradients are those of one device. Inputs may be anywhere; they move. Parameters are those of
    `config.model`, so an optimizer may be made before or after.

    Args:
        config: Model and devices.

    Raises:
        InventoryError: A device does not exist, or is named twice.
        PlacementError: The placement cannot be obeyed.
        InfeasiblePlanError: The model does not fit.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> config = ModelParallelConfig(model=model, device_ids=["cpu@speed=1", "cpu@speed=2"])
        >>> with ModelParallel(config) as parallel:
        ...     [(stage.device, stage.units) for stage in parallel.plan.stages]
        [('emulated:0', ('0',)), ('emulated:1', ('2',))]
    """

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        inventory = resolve_devices(requested_names(config.device_ids, config.backend), memory=config.memory)
        graph = find_units(config.model, config.no_split)
        problem = Problem(graph=graph, inventory=inventory, optimizer_factor=config.optimizer_factor)
        self.plan: Plan = make_plan(_policy(config.placement), problem)
        check_plan(self.plan, graph)
        self.module = config.model
        self._placed: PlacedModel | None = PlacedModel(config.model, self.plan)
        self._placed.place(before_hooks=script_blocks if config.torchscript else None)
        self._reconciler = self._placed.reconciler()

    @property
    def output_device(self) -> torch.device:
        """Where outputs are returned, and where targets for the loss belong."""
        return torch.device(str(self.plan.root.torch_device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; outputs are on `output_device`.

        Raises:
            UsageError: `close` was called.
        """
        if self._placed is None:
            raise UsageError("this ModelParallel is closed; its module runs by itself again: use `.module`")
        args, kwargs = move((args, kwargs), self.output_device)
        if self._reconciler is None:
            return self.module(*args, **kwargs)
        activate(self._reconciler)
        try:
            return move(self.module(*args, **kwargs), self.output_device)
        finally:
            deactivate(self._reconciler)

    def close(self) -> nn.Module:
        """Gather the module on the CPU and take everything back that was done to it; a second call does nothing.

        Returns:
            The module that was given, trained.
        """
        if self._placed is not None:
            self._placed.release(torch.device("cpu"))
            self._placed = self._reconciler = None
        return self.module

    def __enter__(self) -> ModelParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def requested_names(device_ids: Sequence[int | str | torch.device] | None, backend: str | None) -> Any:
    """The request for `resolve_devices` that numbers, texts and devices stand for.

    Raises:
        InventoryError: A number is given and there is no accelerator, or an entry is neither.
    """
    if device_ids is None:
        return None
    kind = _KIND_OF_BACKEND.get(backend or "auto", backend or "auto")
    names: list[Any] = []
    for entry in device_ids:
        if isinstance(entry, bool) or not isinstance(entry, (int, str, torch.device, Mapping)):
            raise InventoryError(f"device_ids: {entry!r} is neither a number, nor a text, nor a torch.device")
        names.append(_numbered(entry, kind) if isinstance(entry, int) else entry)
    return names


def _numbered(index: int, kind: str) -> Any:
    if kind == "cpu":
        return {"name": f"cpu:{index}", "kind": "emulated"}
    if kind == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            raise InventoryError(
                f"device_ids: {index} means accelerator number {index}, and this machine has none. Write 'cpu', or "
                "backend='cpu' to let the CPU play several devices."
            )
        kind = accelerator.type
    return f"{kind}:{index}"


def _policy(placement: str | Mapping[str, str | int] | PlacementPolicy) -> PlacementPolicy:
    if isinstance(placement, str):
        return get_policy(placement)
    if isinstance(placement, Mapping):
        return ManualPolicy({str(key): value for key, value in placement.items()})
    return placement
