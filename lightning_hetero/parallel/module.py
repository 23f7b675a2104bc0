"""A module to train like any other, with its parts on several devices."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import PlacementError, UnsupportedError, UsageError
from lightning_hetero.graph.find import find_units
from lightning_hetero.parallel.config import ModelParallelConfig
from lightning_hetero.parallel.device_ids import kind_of, name_of, requested
from lightning_hetero.parallel.scripted import compile_parts, put_back
from lightning_hetero.placement import ManualPolicy, PlacementPolicy, Problem, get_policy, make_plan
from lightning_hetero.plan import Plan, check_plan
from lightning_hetero.runtime import frames
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.layout import Layout
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.runtime.relocate import Replaced
from lightning_hetero.runtime.transfer import move


class ModelParallel(nn.Module):
    """A module that runs with its parts on several devices and takes and returns tensors on the first of them.

    Outputs, losses and gradients are those of one device. Inputs may be anywhere; they move. Parameters are those of
    `config.model`, so an optimizer may be made before or after. If it has state when the module is placed or closed,
    the state has to follow: `optimizer.load_state_dict(optimizer.state_dict())`.

    Args:
        config: Model and devices.

    Raises:
        InventoryError: A device does not exist, or is named twice.
        PlacementError: The placement cannot be obeyed.
        InfeasiblePlanError: The model does not fit.
        UnsupportedError: TorchScript cannot compile a part, or has compiled the whole model already.
        UsageError: The model is no module, or is placed already; or `micro_batches` is no number from 1 on.

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
        _check_model(config)
        self.plan: Plan = _plan(config)
        self.module = config.model
        self._before_script: Layout | None = None
        self._placed: PlacedModel | None = PlacedModel(
            config.model, self.plan, Pipelining(micro_batches=config.micro_batches)
        )
        try:
            self._placed.place(before_hooks=self._compile if config.torchscript else None)
        except BaseException:
            with suppress(PlacementError):  # a parameter without values could not be moved, and cannot be now
                self._take_back()
            raise
        _warn_of(self._placed.replaced, self.module)
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
        with frames.balanced():
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
            _warn_of(self._take_back(), self.module)
        return self.module

    def __enter__(self) -> ModelParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if self._before_script is not None:
            # torch copies a ScriptModule without its hooks, so the copy would fail at its first border.
            raise UsageError(
                "a ModelParallel with torchscript=True cannot be copied or pickled. Copy its module after close(), "
                "or save its state_dict()."
            )
        return self.__dict__.copy()

    def _compile(self, module: nn.Module, layout: Layout) -> Layout:
        self._before_script = layout
        return compile_parts(module, layout)

    def _take_back(self) -> Replaced:
        """Undo the placing, also one that broke off in the middle."""
        placed, self._placed, self._reconciler = self._placed, None, None
        assert placed is not None
        if self._before_script is not None:
            put_back(self.module, self._before_script)
            placed.layout, self._before_script = self._before_script, None
        if any(parameter.device.type not in ("cpu", "cuda") for parameter in self.module.parameters()):
            # Elsewhere a parameter that something holds cannot move and stay the same object. Graphs and compiled parts
            # that wait for the garbage collector hold some.
            gc.collect()
        return placed.release(torch.device("cpu"))


def _plan(config: ModelParallelConfig) -> Plan:
    kind = kind_of(config.backend)
    memory = None if config.memory is None else {name_of(key, kind): size for key, size in config.memory.items()}
    inventory = resolve_devices(requested(config.device_ids, kind), memory=memory)
    graph = find_units(config.model, config.no_split)
    problem = Problem(graph=graph, inventory=inventory, optimizer_factor=config.optimizer_factor)
    plan = make_plan(_policy(config.placement, kind), problem)
    check_plan(plan, graph)
    return plan


def _policy(placement: Any, kind: str | None) -> PlacementPolicy:
    if isinstance(placement, str):
        return get_policy(placement)
    if isinstance(placement, Mapping):
        return ManualPolicy({str(key): str(name_of(value, kind)) for key, value in placement.items()})
    if isinstance(placement, PlacementPolicy) and not isinstance(placement, type):
        return placement
    raise PlacementError(
        f"placement={placement!r} is neither the name of a policy, nor a mapping of module name to device, nor an "
        "object with a `name` and a method `place(problem)`."
    )


def _check_model(config: object) -> None:
    if not isinstance(config, ModelParallelConfig):
        raise UsageError(
            f"ModelParallel takes a ModelParallelConfig, not a {type(config).__name__}. Write "
            "ModelParallel(ModelParallelConfig(model=model, device_ids=[0, 1]))."
        )
    model: object = config.model
    if not isinstance(model, nn.Module):
        advice = "Make an instance of it first." if isinstance(model, type) else "Wrap it in one."
        raise UsageError(f"the model is {model!r}, which is no instance of torch.nn.Module. {advice}")
    parts: object = config.micro_batches
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise UsageError(f"micro_batches={parts!r} must be a whole number from 1 on: the number of parts of a batch")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            "the model is a TorchScript module, which runs as a whole: its parts cannot stand on several devices. Give "
            "the module that it was made from, and torchscript=True to have each part compiled."
        )
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(hook, Hook) for hook in hooks):
        raise UsageError(
            "the model, or a part of it, is placed over devices already. Call close() on the ModelParallel that did "
            "it, or wait for the end of the Trainer's run."
        )


def _warn_of(replaced: Replaced, module: nn.Module) -> None:
    """Tell that parameters are new objects; whose optimizers hold the old ones is not known here."""
    new = {id(parameter) for _, parameter in replaced}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in new]
    if names:
        warnings.warn(
            f"{', '.join(names)}: torch did not let these parameters move and stay the same objects, because something "
            "still holds them, such as the graph of a forward without backward. An optimizer that was made before "
            "trains the old ones, so make a new one.",
            stacklevel=3,
        )
