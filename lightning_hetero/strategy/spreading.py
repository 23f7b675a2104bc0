"""What the strategies for Trainer and for Fabric share: the user's options, the devices, and plans put into effect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_hetero.devices import Inventory
from lightning_hetero.devices.profile_files import read_device_profile
from lightning_hetero.placement import Constraints, PlacementPolicy
from lightning_hetero.placement.problem import OBJECTIVES
from lightning_hetero.plan import Plan
from lightning_hetero.runtime.confinement import Confinement
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.strategy.accelerator import HeteroAcceleratorCore
from lightning_hetero.strategy.activation_checkpointing import ActivationCheckpointing
from lightning_hetero.strategy.compilation import compiler_options
from lightning_hetero.strategy.console import show_messages
from lightning_hetero.strategy.options import (
    BATCH_NORMS,
    as_constraints,
    as_policy,
    may_checkpoint,
    number_of_micro_batches,
    one_of,
    positive_seconds,
    requested_inventory,
    yes_no_or_auto,
)
from lightning_hetero.strategy.planning import Planning, Terms
from lightning_hetero.strategy.precision import HeteroMixedPrecisionCore

log = logging.getLogger(__name__)

DevicesArgument = str | int | list[str] | dict[str, str | None] | None
PlacementArgument = str | dict[str, str | int] | PlacementPolicy | None

# Methods of a LightningModule that mean one batch.
_ONCE_PER_BATCH = ("log", "log_dict", "manual_backward", "optimizers", "lr_schedulers", "print")


class SpreadingCore:
    """Mixed into strategies of Trainer and of Fabric.

    Attributes:
        inventory: The devices.
    """

    accelerator_class: ClassVar[type[HeteroAcceleratorCore]]
    precision_class: ClassVar[type[HeteroMixedPrecisionCore]]
    _accelerator: Any
    _root_device: torch.device
    _inventory: Inventory | None = None

    def _take_options(
        self,
        *,
        devices: DevicesArgument,
        placement: PlacementArgument,
        memory: dict[str, str | int] | None,
        plan: str | Path | None,
        no_split: str | list[str] | None,
        constraints: Constraints | dict[str, Any] | None,
        objective: str,
        micro_batches: int | None,
        schedules: tuple[str, ...],
        rematerialize: bool | str,
        activation_checkpointing: bool | list[str] | None,
        compile: str | Mapping[str, Any] | None,
        batch_norm: str,
        planning_limit_s: float,
        device_profile: str | Path | None,
        hang_timeout_s: float,
        verbose: bool,
        around: Callable[[], Sequence[Hashable]] = tuple,
    ) -> None:
        """Read what users wrote; see the strategies for what it means."""
        show_messages()
        self._devices = devices
        self._policy = as_policy(placement)
        self._memory: Mapping[str, Any] = dict(memory or {})
        self._plan_file = None if plan is None else Path(plan)
        self._no_split: str | Sequence[str] = no_split or ()
        self._terms = Terms(
            micro_batches=number_of_micro_batches(micro_batches),
            schedules=schedules,
            rematerialize=yes_no_or_auto("rematerialize", rematerialize),
            may_checkpoint=may_checkpoint(activation_checkpointing, compile, rematerialize),
            defers_batch_norm=one_of("batch_norm", batch_norm, BATCH_NORMS) == "defer",
            constraints=as_constraints(constraints),
            objective=one_of("objective", objective, OBJECTIVES),
            time_limit_s=positive_seconds("planning_limit_s", planning_limit_s),
        )
        trusted = self._terms.constraints.trusted
        self._checkpointing = ActivationCheckpointing.of(activation_checkpointing, self._terms.rematerialize)
        self._pipelining = Pipelining(
            defers_batch_norm=self._terms.defers_batch_norm,
            hang_timeout_s=positive_seconds("hang_timeout_s", hang_timeout_s),
            once_per_batch=_ONCE_PER_BATCH,
            around=around,
            compiler=compiler_options(compile),
            confinement=None if trusted is None else Confinement(trusted),
        )
        self._device_profile = None if device_profile is None else Path(device_profile)
        if self._device_profile is not None:
            read_device_profile(self._device_profile)  # a damaged one is refused before anything runs
        self._verbose = verbose

    # Devices

    @property
    def parallel_devices(self) -> None:
        """Always None: to Lightning this strategy has one device. Setting it tells what the host asked for."""
        return

    @parallel_devices.setter
    def parallel_devices(self, devices: Sequence[torch.device]) -> None:
        self._inventory = requested_inventory(self._devices, devices, self._memory, self._place_on_host)
        self._checkpointing.check(self._inventory)
        self._root_device = torch.device(str(self._inventory.root.torch_device))
        self._settle_accelerator()

    def _settle_accelerator(self) -> None:
        """Replace the accelerator that the host chose if it is not for the root device."""
        fits = self._accelerator is not None and _serves(self._accelerator, self._root_device)
        if not fits:
            self._accelerator = self.accelerator_class()
        if isinstance(self._accelerator, HeteroAcceleratorCore):
            self._accelerator.serves_strategy = True

    @property
    def _place_on_host(self) -> tuple[int, int]:
        """Which of the processes on this machine this one is, and how many there are."""
        return 0, 1

    @property
    def inventory(self) -> Inventory | None:
        """The devices of this run; None before a Trainer or Fabric took the strategy."""
        return self._inventory

    # Plans

    def _planning_of(self, module: nn.Module, inventory: Inventory, *, training: bool) -> Planning:
        return Planning.of(
            module,
            inventory,
            self._policy,
            no_split=self._no_split,
            plan_file=self._plan_file,
            training=training,
            terms=self._terms,
        )

    def _completed(self, plan: Plan) -> Plan:
        """The plan with what the user wants of it besides placement."""
        return self._checkpointing.applied(plan, self._rematerializes(plan))

    def _rematerializes(self, plan: Plan) -> bool:
        return plan.execution.rematerialize or self._terms.rematerialize is True

    def _to_place(self, module: nn.Module, plan: Plan) -> PlacedModel:
        """The module, ready to be placed as the plan says."""
        pipelining = replace(
            self._pipelining,
            micro_batches=plan.execution.micro_batches,
            weights=plan.execution.weights,
            rematerialize=self._rematerializes(plan),
        )
        parts = self._terms.micro_batches or 1
        if parts > 1 and len(plan.used) < 2:
            log.warning("micro_batches=%s has no effect: the plan uses one device, so nothing can overlap", parts)
        return PlacedModel(module, plan, pipelining)


def _serves(accelerator: Any, root: torch.device) -> bool:
    """Whether an accelerator of the host works for a root device of this type."""
    name = type(accelerator).__name__.lower()
    return isinstance(accelerator, HeteroAcceleratorCore) or name.startswith(root.type)
