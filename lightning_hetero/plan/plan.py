"""The plan: what was decided, as frozen data that goes through JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError, PlanFileError

FORMAT = "lightning_hetero.plan"
VERSION = 1


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
class Stage:
    """Consecutive units that run together on one device.

    Attributes:
        device: Name of the device.
        units: Module names in order of definition.
        parameters: Number of parameters.
        need: Bytes that the units keep on the device.
    """

    device: str
    units: tuple[str, ...]
    parameters: int
    need: MemoryNeed


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
    """

    policy: str
    devices: tuple[DeviceSpec, ...]
    stages: tuple[Stage, ...]
    loose: MemoryNeed = MemoryNeed()
    notes: tuple[str, ...] = ()
    model: str = ""
    optimizer_factor: float = 0.0
    training: bool = True

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
        """Device name of each unit."""
        return {unit: stage.device for stage in self.stages for unit in stage.units}

    @property
    def used(self) -> tuple[DeviceSpec, ...]:
        """The devices that run at least one unit, in the order of the inventory."""
        names = {stage.device for stage in self.stages}
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
            if stage.device == device:
                need = need + stage.need
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
        except ValueError as error:
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
    try:
        known = {field.name for field in fields(cls)}
        extra = sorted(set(data) - known - {"format", "version"})
        if extra:
            raise PlanFileError(f"the plan has an unknown field {extra[0]!r}; it was edited or is damaged")
        return cls(
            policy=_text(data["policy"]),
            devices=Inventory.from_dict({"devices": data["devices"]}).devices,
            stages=tuple(_stage(stage) for stage in data["stages"]),
            loose=_need(data["loose"]),
            notes=tuple(map(_text, data["notes"])),
            model=_text(data["model"]),
            optimizer_factor=float(data["optimizer_factor"]),
            training=bool(data["training"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError, InventoryError) as error:
        if isinstance(error, PlanFileError):
            raise
        raise PlanFileError(f"the plan is damaged: {type(error).__name__}: {error}") from error


def _stage(data: Mapping[str, Any]) -> Stage:
    return Stage(
        device=_text(data["device"]),
        units=tuple(map(_text, data["units"])),
        parameters=_count(data["parameters"]),
        need=_need(data["need"]),
    )


def _need(data: Mapping[str, Any]) -> MemoryNeed:
    return MemoryNeed(**{field.name: _count(data[field.name]) for field in fields(MemoryNeed)})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a whole number >= 0, got {value!r}")
    return value
