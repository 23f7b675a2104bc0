"""The nouns of the inventory: a device, a link between two devices, and all of them together.

Strings and numbers only, so that an inventory is a file that can be mailed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lightning_hetero.devices.origins import check_numbers
from lightning_hetero.errors import InventoryError
from lightning_hetero.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A place where units run.

    Attributes:
        name: Unique in its inventory: "cuda:0", "cpu", "emulated:1".
        kind: Sort of processor: "cpu", "cuda", "xpu", "mps", the name of a PrivateUse1 backend,
            "emulated", or a deployment target such as "dla" and "fpga".
        memory_bytes: What a plan may use, after the limits of the user and of the system.
        torch_device: Where tensors live in torch's spelling ("cuda:0", "cpu"), or None for a processor
            that torch cannot address.
        total_memory_bytes: What the device has, if known.
        label: Product name, for people.
        speed: Relative to the other devices; 2.0 halves the time. 1.0 until measured.
        threads: Intra-op threads of an emulated device; None leaves torch's setting alone.
        dtypes: Names of the dtypes that the device computes with ("float32"); empty if unknown.
        trainable: Whether torch can train on it.
        emulated: Whether it is the CPU that plays a device.
        flops_per_s: Floating-point operations per second of a matrix product, by name of the dtype:
            `(("float32", 2e13),)`. Achieved ones if measured, the peak of dense products if from a data sheet.
        memory_bytes_per_s: Bytes that a copy within the device reads and writes per second.
        launch_s: What it costs to start one small operation.
        measured: Where these numbers come from, one of `origins.ORIGINS`.
    """

    name: str
    kind: str
    memory_bytes: int
    torch_device: str | None
    total_memory_bytes: int | None = None
    label: str = ""
    speed: float = 1.0
    threads: int | None = None
    dtypes: tuple[str, ...] = ()
    trainable: bool = True
    emulated: bool = False
    flops_per_s: tuple[tuple[str, float], ...] = ()
    memory_bytes_per_s: float | None = None
    launch_s: float | None = None
    measured: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise InventoryError("a device needs a name")
        if self.memory_bytes <= 0:
            raise InventoryError(f"device {self.name!r}: memory_bytes must be > 0, got {self.memory_bytes}")
        if not 0 < self.speed < float("inf"):
            raise InventoryError(f"device {self.name!r}: speed must be a finite number > 0, got {self.speed}")
        if self.threads is not None and self.threads < 1:
            raise InventoryError(f"device {self.name!r}: threads must be >= 1, got {self.threads}")
        if self.trainable and self.torch_device is None:
            raise InventoryError(f"device {self.name!r}: a trainable device needs torch's name for it")
        rates: dict[str, float | None] = {f"flops_per_s of {dtype}": rate for dtype, rate in self.flops_per_s}
        rates |= {"memory_bytes_per_s": self.memory_bytes_per_s, "launch_s": self.launch_s}
        check_numbers(f"device {self.name!r}", rates, self.measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way from one device to another. Both directions are listed apart: they can differ.

    Attributes:
        source: Name of the sending device.
        target: Name of the receiving device.
        peer_access: Whether copies go directly, without a stop in host memory.
        bandwidth_bytes_per_s: Of ordinary memory, which is what the runtime moves. None until measured.
        latency_s: None until measured.
        pinned_bandwidth_bytes_per_s: The same with page-locked host memory; None where there is no host or no
            such memory, and until measured.
        measured: Where these numbers come from, one of `origins.ORIGINS`.
    """

    source: str
    target: str
    peer_access: bool = False
    bandwidth_bytes_per_s: float | None = None
    latency_s: float | None = None
    pinned_bandwidth_bytes_per_s: float | None = None
    measured: str = ""

    def __post_init__(self) -> None:
        what = f"link {self.source!r} to {self.target!r}"
        rates = {name: getattr(self, name) for name in ("bandwidth_bytes_per_s", "pinned_bandwidth_bytes_per_s")}
        check_numbers(what, rates, self.measured)
        if self.latency_s is not None and not 0 <= self.latency_s < float("inf"):
            raise InventoryError(f"{what}: latency_s must be a finite number >= 0, got {self.latency_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """A group of CPU cores with memory of its own."""

    index: int
    cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The devices of one machine in order of preference, the first trainable one being the root.

    The root is the device that Lightning and user code see: batches, outputs and metrics live there.
    """

    devices: tuple[DeviceSpec, ...]
    links: tuple[Link, ...] = ()
    host: str = ""
    numa_nodes: tuple[NumaNode, ...] = ()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for device in self.devices:
            if device.name in seen:
                raise InventoryError(f"device {device.name!r} is listed twice; leave one of them out")
            seen.add(device.name)

    def __iter__(self) -> Iterator[DeviceSpec]:
        return iter(self.devices)

    def __len__(self) -> int:
        return len(self.devices)

    def __getitem__(self, name: str) -> DeviceSpec:
        for device in self.devices:
            if device.name == name:
                return device
        raise InventoryError(f"unknown device {name!r}; the inventory has: {', '.join(self.names) or 'none'}")

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all devices, in order."""
        return tuple(device.name for device in self.devices)

    @property
    def trainable(self) -> tuple[DeviceSpec, ...]:
        """The devices on which torch can train, in order."""
        return tuple(device for device in self.devices if device.trainable)

    @property
    def root(self) -> DeviceSpec:
        """The first trainable device.

        Raises:
            InventoryError: No device can train.
        """
        if not self.trainable:
            raise InventoryError(
                f"none of the devices can train: {', '.join(self.names) or 'the inventory is empty'}. "
                "Add one that torch can train on, such as 'cpu'."
            )
        return self.trainable[0]

    def link(self, source: str, target: str) -> Link:
        """The link from `source` to `target`; one with nothing known about it if none is listed."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        return Link(source=source, target=target)

    def with_memory(self, limits: Mapping[str, int | float | str]) -> Inventory:
        """The same inventory under tighter limits, for example `{"cuda:0": "10GiB"}`.

        Raises:
            InventoryError: A name is unknown, or a limit is not a size above 0.
        """
        unknown = [name for name in limits if name not in self]
        if unknown:
            raise InventoryError(
                f"memory limit for unknown device {unknown[0]!r}; the inventory has: {', '.join(self.names)}"
            )
        try:
            sizes = {name: parse_bytes(size) for name, size in limits.items()}
        except ValueError as error:
            raise InventoryError(f"memory limit: {error}") from error
        devices = tuple(
            replace(device, memory_bytes=sizes.get(device.name, device.memory_bytes)) for device in self.devices
        )
        return replace(self, devices=devices)

    def to_dict(self) -> dict[str, Any]:
        """The inventory as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inventory:
        """Read what `to_dict` wrote.

        Raises:
            InventoryError: A field is missing, unknown or of a wrong value.
        """
        try:
            return cls(
                devices=tuple(map(_device, data["devices"])),
                links=tuple(_record(Link, d) for d in data.get("links", ())),
                host=str(data.get("host", "")),
                numa_nodes=tuple(
                    _record(NumaNode, d, cpus=tuple(d.get("cpus", ()))) for d in data.get("numa_nodes", ())
                ),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InventoryError(f"not an inventory: {error!r}") from error


def _device(data: Mapping[str, Any]) -> DeviceSpec:
    try:
        rates = tuple((str(dtype), rate) for dtype, rate in data.get("flops_per_s", ()))
    except ValueError as error:
        raise InventoryError(f"flops_per_s must be pairs of a dtype and a rate: {error}") from error
    for key in ("name", "kind"):
        if key in data and not isinstance(data[key], str):
            raise InventoryError(f"the {key} of a device must be a text, got {data[key]!r}")
    device: DeviceSpec = _record(DeviceSpec, data, dtypes=tuple(data.get("dtypes", ())), flops_per_s=rates)
    return device


def _record(cls: type[Any], data: Mapping[str, Any], **replaced: Any) -> Any:
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise InventoryError(f"unknown field {unknown[0]!r} of a {cls.__name__}; known are {', '.join(sorted(known))}")
    return cls(**{**data, **{key: value for key, value in replaced.items() if key in data}})
