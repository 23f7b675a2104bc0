"""Devices and links written by people: mappings with friendly keys such as `memory: 10GiB`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from lightning_hetero.devices.emulated import KIND as EMULATED
from lightning_hetero.devices.emulated import Emulation
from lightning_hetero.devices.fields import (
    Key,
    list_of,
    or_none,
    read_bandwidth,
    read_flag,
    read_number,
    read_rates,
    read_record,
    read_size,
    read_text,
    read_whole,
)
from lightning_hetero.devices.spec import DeviceSpec, Link, NumaNode
from lightning_hetero.errors import InventoryError

# Processors that run an exported model but that torch cannot train on.
DEPLOYMENT_KINDS = ("dla", "fpga", "vitis", "qnn", "intel-npu", "onnx", "openvino", "aoti", "torchscript")

_DEVICE_KEYS = {
    "name": Key("name", read_text),
    "kind": Key("kind", read_text),
    "memory": Key("memory_bytes", or_none(read_size)),
    "memory_bytes": Key("memory_bytes", or_none(read_size)),
    "total_memory": Key("total_memory_bytes", or_none(read_size)),
    "total_memory_bytes": Key("total_memory_bytes", or_none(read_size)),
    "torch_device": Key("torch_device", or_none(read_text)),
    "label": Key("label", read_text),
    "speed": Key("speed", read_number),
    "threads": Key("threads", or_none(read_whole)),
    "dtypes": Key("dtypes", list_of(read_text)),
    "trainable": Key("trainable", read_flag),
    "emulated": Key("emulated", read_flag),
    "flops_per_s": Key("flops_per_s", read_rates),
    "memory_bandwidth": Key("memory_bytes_per_s", or_none(read_bandwidth)),
    "memory_bytes_per_s": Key("memory_bytes_per_s", or_none(read_bandwidth)),
    "launch_s": Key("launch_s", or_none(read_number)),
    "measured": Key("measured", read_text),
}
_LINK_KEYS = {
    "source": Key("source", read_text),
    "target": Key("target", read_text),
    "peer_access": Key("peer_access", read_flag),
    "bandwidth": Key("bandwidth_bytes_per_s", or_none(read_bandwidth)),
    "bandwidth_bytes_per_s": Key("bandwidth_bytes_per_s", or_none(read_bandwidth)),
    "latency_s": Key("latency_s", or_none(read_number)),
    "pinned_bandwidth": Key("pinned_bandwidth_bytes_per_s", or_none(read_bandwidth)),
    "pinned_bandwidth_bytes_per_s": Key("pinned_bandwidth_bytes_per_s", or_none(read_bandwidth)),
    "measured": Key("measured", read_text),
}
_NUMA_KEYS = {
    "index": Key("index", read_whole),
    "cpus": Key("cpus", list_of(read_whole)),
    "memory_bytes": Key("memory_bytes", read_size),
}


def device_from_record(
    record: Mapping[str, Any],
    *,
    cpu: Callable[[], DeviceSpec],
    real: Callable[[str], DeviceSpec | None],
    next_name: Callable[[], str],
) -> DeviceSpec:
    """One device from a mapping with the fields of `DeviceSpec`, or `memory` and `total_memory` as sizes.

    What the record leaves out comes from the device of that name on this machine, from the CPU for an
    emulated device, and from its kind for a processor that only runs exported models.

    Args:
        record: Such as `{"name": "dla:0", "kind": "dla", "memory": "1GiB"}`.
        cpu: The CPU that plays emulated devices.
        real: The device of this machine that torch calls so, or None.
        next_name: A name for an emulated device without one.

    Raises:
        InventoryError: A key is unknown, a value is wrong, or the name or memory is missing.
    """
    given = read_record(record, _DEVICE_KEYS, "a device")
    if given.get("memory_bytes", 0) is None:
        del given["memory_bytes"]  # "memory: null" asks for no limit
    emulated = given.get("emulated", given.get("kind") == EMULATED)
    name = given.get("name") or (next_name() if emulated else "")
    if not name:
        raise InventoryError(f"a device needs a name: {dict(record)!r}; write for example name: 'cuda:0'")
    kind = given.get("kind") or (EMULATED if emulated else name.partition(":")[0])
    given |= {"name": name, "kind": kind}
    if emulated:
        played = Emulation(memory_bytes=given.get("memory_bytes")).device(name, cpu())
        return replace(played, **given)
    if not given.get("trainable", kind not in DEPLOYMENT_KINDS):
        return _complete({"torch_device": None, "trainable": False, **given}, None)
    torch_device = given.get("torch_device") or _torch_name(name, kind)
    return _complete({**given, "torch_device": torch_device}, real(torch_device))


def link_from_record(record: object) -> Link:
    """One link from a mapping with the fields of `Link`, or `bandwidth` as a size per second: "12GB".

    Raises:
        InventoryError: A key is unknown, a value is wrong, or an end is missing.
    """
    given = read_record(record, _LINK_KEYS, "a link")
    for end in ("source", "target"):
        if not given.get(end):
            raise InventoryError(f"a link needs a {end}: {record!r}; write the name of a device")
    return Link(**given)


def numa_node_from_record(record: object) -> NumaNode:
    """One NUMA node from a mapping with its fields.

    Raises:
        InventoryError: A field is missing, unknown or of a wrong value.
    """
    given = read_record(record, _NUMA_KEYS, "a NUMA node")
    missing = [field.name for field in fields(NumaNode) if field.name not in given]
    if missing:
        raise InventoryError(f"a NUMA node needs {missing[0]!r}: {record!r}")
    return NumaNode(**given)


def _complete(given: dict[str, Any], known: DeviceSpec | None) -> DeviceSpec:
    """`given`, and what this machine knows of the same device for the rest."""
    if known is not None:
        seen = {"memory_bytes", "total_memory_bytes", "label", "dtypes"} - set(given)
        given = {**{field: getattr(known, field) for field in seen}, **given}
    if "memory_bytes" not in given:
        raise InventoryError(
            f"device {given['name']!r}: its memory is not given, and it is not a device of this machine "
            "that could be asked; write for example memory: 16GiB"
        )
    return DeviceSpec(**given)


def _torch_name(name: str, kind: str) -> str:
    head, _, index = name.partition(":")
    if head == kind and (not index or index.isdecimal()):
        return name
    raise InventoryError(
        f"device {name!r} of kind {kind!r}: torch's name for it is missing; write for example "
        f"torch_device: '{kind}:0', or trainable: false if torch cannot train on it"
    )
