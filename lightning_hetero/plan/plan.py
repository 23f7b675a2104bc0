"""The plan: what was decided, as frozen data that goes through JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import PlanFileError
from lightning_hetero.plan.forecast import Alternative, DeviceForecast, Execution, Forecast
from lightning_hetero.plan.read import read_record

__all__ = [
    "Alternative",
    "DeviceForecast",
    "Execution",
    "Forecast",
    "MemoryNeed",
    "Plan",
    "Share",
    "Stage",
]

FORMAT = "lightning_hetero.plan"
VERSION = 1
LATER_FIELDS = ("execution", "forecast", "proof", "alternatives", "objective", "seed")
"""What plans of earlier releases do not have; such a plan is read with the defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Bytes that stay on a device through a whole run. Activations are not counted."""

    parameters_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    buffers_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.buffers_bytes

    def __add__(self, other: MemoryNeed) -> MemoryNeed:
        return MemoryNeed(
            parameters_bytes=self.parameters_bytes + other.parameters_bytes,
            gradients_bytes=self.gradients_bytes + other.gradients_bytes,
            optimizer_bytes=self.optimizer_bytes + other.optimizer_bytes,
            buffers_bytes=self.buffers_bytes + other.buffers_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of every batch that one replica of a stage gets.

    Attributes:
        device: Name of the replica's device.
        share: How much it gets, in proportion to the other replicas; above 0.
    """

    device: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive units that run together on one device, or on several that share the rows of a batch.

    Attributes:
        device: Name of the device that owns the parameters.
        units: Module names in order of definition.
        parameters: Number of parameters.
        need: Bytes that the units keep on the device.
        shares: The replicas, the owner first; none if the owner does everything.
        activation_checkpointing: Whether its layers keep their inputs only, and run again in the backward.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("shares", "activation_checkpointing")

    device: str
    units: tuple[str, ...]
    parameters: int
    need: MemoryNeed
    shares: tuple[Share, ...] = ()
    activation_checkpointing: bool = False

    def need_on(self, device: str) -> MemoryNeed:
        """Bytes that it keeps on a device: a replica has no optimizer state."""
        if device == self.device:
            return self.need
        if device not in {share.device for share in self.shares}:
            return MemoryNeed()
        return replace(self.need, optimizer_bytes=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which units run where, and why.

    Attributes:
        policy: Name of the placement policy that decided.
        devices: The devices of the inventory for which the plan was made; the first trainable one is the root.
        stages: In order of definition; a device may own several.
        loose: What the root holds besides its stages: parameters and buffers of modules that were split.
        notes: Reasons, one sentence each.
        model: Fingerprint of the model.
        optimizer_factor: Bytes of optimizer state for each byte of trained parameter.
        training: Whether gradients and optimizer state are counted.
        execution: How a batch runs.
        forecast: What that will take; None if nobody predicted it.
        proof: What is known about how good the plan is, in words.
        alternatives: What was rejected, the best first.
        objective: What was minimised.
        seed: Of whatever was random in the search.
    """

    policy: str
    devices: tuple[DeviceSpec, ...]
    stages: tuple[Stage, ...]
    loose: MemoryNeed = MemoryNeed()
    notes: tuple[str, ...] = ()
    model: str = ""
    optimizer_factor: float = 0.0
    training: bool = True
    execution: Execution = field(default_factory=Execution)
    forecast: Forecast | None = None
    proof: str = ""
    alternatives: tuple[Alternative, ...] = ()
    objective: str = "step_time"
    seed: int = 0

    @property
    def inventory(self) -> Inventory:
        """The devices as an inventory."""
        return Inventory(devices=self.devices)

    @property
    def root(self) -> DeviceSpec:
        """The device that user code sees."""
        return self.inventory.root

    @property
    def device_of(self) -> dict[str, str]:
        """Device name of each unit; of a replicated one, that of its owner."""
        return {unit: stage.device for stage in self.stages for unit in stage.units}

    @property
    def shares_of(self) -> dict[str, tuple[Share, ...]]:
        """The replicas of each unit that has some."""
        return {unit: stage.shares for stage in self.stages if stage.shares for unit in stage.units}

    @property
    def checkpointed(self) -> tuple[str, ...]:
        """The units of stages with activation checkpointing."""
        return tuple(unit for stage in self.stages if stage.activation_checkpointing for unit in stage.units)

    def with_checkpointing(self, units: Collection[str]) -> Plan:
        """The same plan with activation checkpointing for the stages of these units, and for no others."""
        chosen = set(units)
        stages = (replace(stage, activation_checkpointing=not chosen.isdisjoint(stage.units)) for stage in self.stages)
        return replace(self, stages=tuple(stages))

    @property
    def used(self) -> tuple[DeviceSpec, ...]:
        """The devices that run at least one unit, in the order of the inventory."""
        names = {stage.device for stage in self.stages}
        names |= {share.device for stage in self.stages for share in stage.shares}
        return tuple(device for device in self.devices if device.name in names)

    @property
    def torch_devices(self) -> tuple[str, ...]:
        """Where tensors live, without repetition: the root first."""
        places = (self.root.torch_device, *(device.torch_device for device in self.used))
        return tuple(dict.fromkeys(place for place in places if place is not None))

    def need_of(self, device: str) -> MemoryNeed:
        """What the plan asks of one device."""
        need = self.loose if device == self.root.name else MemoryNeed()
        for stage in self.stages:
            need = need + stage.need_on(device)
        return need

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def to_json(self) -> str:
        """The plan as text that `from_json` reads back; no code and no class names."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanFileError: The text is no JSON, no plan, newer than this package, or damaged.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanFileError(f"the plan is not valid JSON ({error}); it was cut short or edited") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            PlanFileError: It is no plan, newer than this package, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise PlanFileError(f"not a plan of this package: the field 'format' must be {FORMAT!r}")
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise PlanFileError(f"the plan's version must be a whole number from 1 to {VERSION}, got {version!r}")
        if version > VERSION:
            raise PlanFileError(
                f"the plan has version {version}, this package reads up to {VERSION}. "
                "Update lightning-hetero, or make the plan again."
            )
        return _plan(cls, data)


def _plan(cls: type[Plan], data: Mapping[str, Any]) -> Plan:
    record = {name: value for name, value in data.items() if name not in ("format", "version")}
    extra = sorted(set(record) - {known.name for known in fields(cls)})
    if extra:
        raise PlanFileError(f"the plan has an unknown field {extra[0]!r}; it was edited or is damaged")
    try:
        plan = read_record(cls, record, optional=LATER_FIELDS, readers={"devices": _devices})
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise PlanFileError(f"the plan is damaged: {type(error).__name__}: {error}") from error
    known = {device.name for device in plan.devices}
    named = [name for stage in plan.stages for name in (stage.device, *(share.device for share in stage.shares))]
    strange = next((name for name in named if name not in known), None)
    if strange is not None:
        raise PlanFileError(f"the plan is damaged: a stage stands on {strange!r}, which is not among its devices")
    if not all(stage.units for stage in plan.stages):
        raise PlanFileError("the plan is damaged: a stage has no units")
    units = Counter(unit for stage in plan.stages for unit in stage.units)
    twice = next((unit for unit, times in units.items() if times > 1), None)
    if twice is not None:
        raise PlanFileError(f"the plan is damaged: {twice!r} stands in more than one stage")
    return plan


def _devices(data: object) -> tuple[DeviceSpec, ...]:
    return Inventory.from_dict({"devices": data}).devices
