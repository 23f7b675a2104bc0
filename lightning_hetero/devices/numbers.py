"""What is known of the pace of devices and links: the nouns that measuring makes and that a device profile holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_hetero.devices.fields import Key, or_none, read_number, read_rates, read_record, read_text, read_whole
from lightning_hetero.devices.origins import LOW_CONFIDENCE, MEASURED, check_numbers
from lightning_hetero.errors import InventoryError

MOST_SPREAD = 0.3
"""Where the two best passes differ by more than this share, neither is to be relied on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNumbers:
    """The pace of a device.

    Attributes:
        device: Torch's name for it, or its name in an inventory.
        threads: Intra-op threads of a CPU that plays a device; None is torch's own setting.
        flops_per_s: By name of the dtype; not empty.
        memory_bytes_per_s: Read and written by a copy.
        launch_s: One small operation.
        spreads: How far each of these may be off, as a share, by "float32" and so on, "memory" and "launch".
        measured: `MEASURED`, `LOW_CONFIDENCE`, or another of `origins.ORIGINS`.
    """

    device: str
    threads: int | None = None
    flops_per_s: tuple[tuple[str, float], ...]
    memory_bytes_per_s: float | None = None
    launch_s: float | None = None
    spreads: tuple[tuple[str, float], ...] = ()
    measured: str = MEASURED

    def __post_init__(self) -> None:
        what = f"device {self.device!r}"
        if not self.flops_per_s:
            raise InventoryError(f"{what}: flops_per_s must have at least one dtype")
        numbers: dict[str, float | None] = {f"flops_per_s of {dtype}": rate for dtype, rate in self.flops_per_s}
        numbers |= {"memory_bytes_per_s": self.memory_bytes_per_s, "launch_s": self.launch_s}
        check_numbers(what, numbers, self.measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkNumbers:
    """The pace of a link.

    Attributes:
        source: Torch's name of the sending device, or its name in an inventory.
        target: The same of the receiving device.
        bandwidth_bytes_per_s: Of ordinary memory.
        latency_s: A transfer of one number.
        pinned_bandwidth_bytes_per_s: With page-locked host memory, where there is such a thing.
        spreads: How far each may be off, by "bandwidth", "latency" and "pinned".
        measured: As for a device.
    """

    source: str
    target: str
    bandwidth_bytes_per_s: float
    latency_s: float
    pinned_bandwidth_bytes_per_s: float | None = None
    spreads: tuple[tuple[str, float], ...] = ()
    measured: str = MEASURED

    def __post_init__(self) -> None:
        numbers = {
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
            "latency_s": self.latency_s,
            "pinned_bandwidth_bytes_per_s": self.pinned_bandwidth_bytes_per_s,
        }
        check_numbers(f"link {self.source!r} to {self.target!r}", numbers, self.measured)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Numbers of devices and links."""

    devices: tuple[DeviceNumbers, ...] = ()
    links: tuple[LinkNumbers, ...] = ()

    def device(self, *names: str | None, threads: int | None = None) -> DeviceNumbers | None:
        """The numbers of the first of these names that has any with so many threads."""
        found = {(numbers.device, numbers.threads): numbers for numbers in self.devices}
        return next((found[name, threads] for name in names if name and (name, threads) in found), None)

    def link(self, *ends: tuple[str | None, str | None]) -> LinkNumbers | None:
        """The numbers of the first of these pairs that has any."""
        found: dict[tuple[str | None, str | None], LinkNumbers] = {(n.source, n.target): n for n in self.links}
        return next((found[pair] for pair in ends if pair in found), None)

    def and_then(self, other: DeviceProfile) -> DeviceProfile:
        """Both; where they speak of the same, this one."""
        devices = {(n.device, n.threads): n for n in (*other.devices, *self.devices)}
        links = {(n.source, n.target): n for n in (*other.links, *self.links)}
        return DeviceProfile(tuple(devices.values()), tuple(links.values()))

    def confident(self) -> DeviceProfile:
        """What was measured without noise."""
        return DeviceProfile(
            tuple(numbers for numbers in self.devices if numbers.measured == MEASURED),
            tuple(numbers for numbers in self.links if numbers.measured == MEASURED),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"devices": [_record(n) for n in self.devices], "links": [_record(n) for n in self.links]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeviceProfile:
        """Read what `to_dict` wrote, or what a person wrote like it.

        Raises:
            InventoryError: A key is missing, unknown or of a wrong value.
        """
        devices = (read_record(record, _DEVICE_KEYS, "a device's numbers") for record in _list(data, "devices"))
        links = (read_record(record, _LINK_KEYS, "a link's numbers") for record in _list(data, "links"))
        try:
            return cls(
                tuple(DeviceNumbers(**fields) for fields in devices), tuple(LinkNumbers(**fields) for fields in links)
            )
        except TypeError as error:  # a field is missing
            raise InventoryError(f"numbers are incomplete: {error}") from error


def confidence(spreads: Iterable[float], *, busy: bool) -> str:
    """How far numbers can be relied on.

    Args:
        spreads: Of all of them.
        busy: Whether the machine had other work when they were measured.
    """
    return LOW_CONFIDENCE if busy or any(spread > MOST_SPREAD for spread in spreads) else MEASURED


_DEVICE_KEYS = {
    "device": Key("device", read_text),
    "threads": Key("threads", or_none(read_whole)),
    "flops_per_s": Key("flops_per_s", read_rates),
    "memory_bytes_per_s": Key("memory_bytes_per_s", or_none(read_number)),
    "launch_s": Key("launch_s", or_none(read_number)),
    "spreads": Key("spreads", read_rates),
    "measured": Key("measured", read_text),
}
_LINK_KEYS = {
    "source": Key("source", read_text),
    "target": Key("target", read_text),
    "bandwidth_bytes_per_s": Key("bandwidth_bytes_per_s", read_number),
    "latency_s": Key("latency_s", read_number),
    "pinned_bandwidth_bytes_per_s": Key("pinned_bandwidth_bytes_per_s", or_none(read_number)),
    "spreads": Key("spreads", read_rates),
    "measured": Key("measured", read_text),
}


def _record(numbers: DeviceNumbers | LinkNumbers) -> dict[str, Any]:
    keys = _DEVICE_KEYS if isinstance(numbers, DeviceNumbers) else _LINK_KEYS
    record = {name: getattr(numbers, key.field) for name, key in keys.items()}
    return {name: dict(value) if isinstance(value, tuple) else value for name, value in record.items()}


def _list(data: Mapping[str, Any], key: str) -> list[object]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise InventoryError(f"{key} must be a list, got {value!r}")
    return value
