"""What has to be placed, where it could go, what it costs, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.placement.constraints import Constraints, check_names
from lightning_hetero.placement.names import did_you_mean
from lightning_hetero.plan.build import loose_need, unit_need
from lightning_hetero.plan.forecast import FORWARD, WHOLE
from lightning_hetero.profile.costs import ModelProfile
from lightning_hetero.schedule import schedule_names

OBJECTIVES = ("step_time", "latency", "throughput", "peak_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What has to be placed, and where it could go.

    Attributes:
        graph: The model.
        inventory: The devices; only its trainable ones may be used, unless the model is to be deployed.
        training: Whether gradients and optimizer state need room.
        optimizer_factor: Bytes of optimizer state for each byte of trained parameter (Adam: 2).
        profile: What the model costs; None: nobody has measured it.
        micro_batches: How many a batch is cut into where it is cut; None: the policy chooses.
        schedules: Ways to run that the policy may choose from: "whole", "forward", or names of schedules of steps.
        rematerialize: Whether "forward" runs forwards again in the backward; None: the policy chooses.
        may_checkpoint: Whether layers may keep their inputs only and run again in the backward where nothing else fits.
        defers_batch_norm: Whether micro-batches may be normalised by their own mean and variance.
        constraints: Rules for every policy.
        objective: What to minimise. "step_time": seconds of a step. "throughput": the same, since the batch is given
            and steps do not overlap; in a deployment, where batches follow each other through the stages, seconds
            from one to the next. "latency": seconds of the forward alone. "peak_memory": the share of its memory
            that the fullest device uses.
        deployment: Whether the model is exported, for inference. Units may then stand on devices that cannot train.
        refused: For devices that do not take every unit: the device's name to those that it does not take, each with
            the reason in words that fit after the device's name.
        time_limit_s: Seconds that the caller grants, for the notes; it is up to `out_of_time` to look at a clock.
        out_of_time: Asked now and then; once it says True, the best placement so far is taken.

    Raises:
        PlacementError: A number, word or name makes no sense.
    """

    graph: ModelGraph
    inventory: Inventory
    training: bool = True
    optimizer_factor: float = 2.0
    profile: ModelProfile | None = None
    micro_batches: int | None = None
    schedules: tuple[str, ...] = (WHOLE, FORWARD)
    rematerialize: bool | None = False
    may_checkpoint: bool = False
    defers_batch_norm: bool = False
    constraints: Constraints = field(default_factory=Constraints)
    objective: str = "step_time"
    deployment: bool = False
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    time_limit_s: float = 10.0
    out_of_time: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if not self.optimizer_factor >= 0:
            raise PlacementError(
                f"optimizer_factor must be at least 0 (Adam: 2, SGD: 0), got {self.optimizer_factor}: it is the bytes "
                "of optimizer state for each byte of trained parameter"
            )
        if self.micro_batches is not None and self.micro_batches < 1:
            raise PlacementError(
                f"micro_batches must be at least 1, got {self.micro_batches}; 1 leaves the batch in one piece, and "
                "None lets the policy choose"
            )
        if self.objective not in OBJECTIVES:
            raise PlacementError(
                f"unknown objective {self.objective!r}.{did_you_mean(self.objective, OBJECTIVES, 1)} "
                f"Known are {', '.join(OBJECTIVES)}."
            )
        if self.deployment and self.training:
            raise PlacementError(
                "a model that is trained cannot be planned as a deployment, where devices run an exported copy of it. "
                "Set training to false, or deployment to false."
            )
        self._check_schedules()
        strange = [unit.name for unit in self.profile.units if unit.name not in self.graph] if self.profile else []
        if strange:
            raise PlacementError(
                f"the profile is of another model: {strange[0]!r} is no unit of this one. Measure this model, or leave "
                "out the profile."
            )
        check_names(self)

    def _check_schedules(self) -> None:
        known = (WHOLE, FORWARD, *schedule_names())
        strange = [name for name in self.schedules if name not in known]
        if strange or not self.schedules:
            hint = did_you_mean(strange[0], known, 1) if strange else ""
            what = f"unknown schedule {strange[0]!r}.{hint}" if strange else "no schedule."
            raise PlacementError(f"{what} A plan needs at least one of {', '.join(known)}.")
        if set(self.schedules) == {WHOLE} and (self.micro_batches or 1) > 1:
            raise PlacementError(
                f"{self.micro_batches} micro-batches cannot run as 'whole', which leaves the batch in one piece. "
                "Allow 'forward' or a schedule of steps, or set micro_batches to 1."
            )

    @property
    def candidates(self) -> tuple[DeviceSpec, ...]:
        """Devices that could run units at all: those that can train, or in a deployment every one."""
        return self.inventory.devices if self.deployment else self.inventory.trainable

    @property
    def usable(self) -> tuple[DeviceSpec, ...]:
        """Devices on which units may stand: candidates that take some, are not forbidden, and were measured if any was.

        Raises:
            PlacementError: There is none.
        """
        measured = self.profile.devices if self.profile is not None and self.profile.units else self.inventory.names
        devices = tuple(
            device
            for device in self.candidates
            if device.name not in self.constraints.forbidden
            and device.name in measured
            and not self._takes_nothing(device.name)
        )
        if not devices:
            able = ", ".join(device.name for device in self.candidates) or "none"
            raise PlacementError(
                f"no device is left to place units on: {able} can {'run them' if self.deployment else 'train'}, "
                f"{', '.join(measured) or 'none'} were measured, and {', '.join(self.constraints.forbidden) or 'none'} "
                "are forbidden. Allow one, or measure again."
            )
        return devices

    @property
    def is_stream(self) -> bool:
        """Whether batches follow each other through the stages, and how often one leaves is what counts."""
        return self.deployment and self.objective == "throughput"

    @property
    def coupled(self) -> tuple[str, ...]:
        """Modules for which "forward" does not cut batches; none if it may, or if nobody looked."""
        if self.profile is None or not self.training or self.defers_batch_norm:
            return ()
        return self.profile.coupled

    def need_bytes(self, units: Sequence[Unit]) -> int:
        """What the units keep on their device, without activations."""
        return sum(unit_need(unit, self.training, self.optimizer_factor).total_bytes for unit in units)

    @property
    def loose_bytes(self) -> int:
        """What the root device holds besides units."""
        return loose_need(self.graph, self.training, self.optimizer_factor).total_bytes

    def room_bytes(self) -> dict[str, int]:
        """Room for units on each usable device."""
        room = {device.name: device.memory_bytes for device in self.usable}
        if self.inventory.root.name in room:
            room[self.inventory.root.name] -= self.loose_bytes
        return room

    def time_is_up(self) -> bool:
        """Whether to take the best placement so far."""
        return self.out_of_time is not None and self.out_of_time()

    def _takes_nothing(self, device: str) -> bool:
        refused = self.refused.get(device, {})
        return bool(refused) and all(name in refused for name in self.graph.names)
