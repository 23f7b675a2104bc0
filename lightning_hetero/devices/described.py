"""The content of an inventory file, as an inventory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_hetero.devices.assemble import devices_of, put_together
from lightning_hetero.devices.here import Here
from lightning_hetero.devices.links import links_between
from lightning_hetero.devices.records import link_from_record, numa_node_from_record
from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import InventoryError

_KEYS = ("devices", "links", "host", "numa_nodes")


def described_inventory(data: object, here: Here, *, must_exist: bool, origin: str) -> Inventory:
    """Read `{"devices": [...], "links": [...]}`, friendly or as `Inventory.to_dict` writes it, or a bare list.

    Args:
        data: As YAML or JSON gave it. Links, host and NUMA nodes that are not given are those of `here`
            if the devices must exist there, and else unknown.
        here: Where names are looked up.
        must_exist: Whether the devices are those of this machine.
        origin: What the data is, for messages.

    Raises:
        InventoryError: The data is not of that form, or a device in it is wrong.
    """
    if isinstance(data, Sequence) and not isinstance(data, str):
        data = {"devices": data}
    if not isinstance(data, Mapping) or "devices" not in data:
        raise InventoryError(f"{origin} has no list of devices; write devices: [{{name: cpu, memory: 8GiB}}]")
    unknown = next((key for key in data if key not in _KEYS), None)
    if unknown is not None:
        raise InventoryError(f"{origin} has an unknown key {unknown!r}; known are {', '.join(_KEYS)}")
    parts = _list(data["devices"], "devices", origin)
    inventory = put_together(devices_of(parts, here, must_exist=must_exist), here)
    if not must_exist:
        inventory = Inventory(devices=inventory.devices, links=links_between(inventory.devices))
    return _with_given(inventory, data, origin)


def _with_given(inventory: Inventory, data: Mapping[str, Any], origin: str) -> Inventory:
    """The inventory with the links, host and NUMA nodes of the data, as far as it has them."""
    given: dict[str, Any] = {}
    if "links" in data:
        given["links"] = tuple(map(link_from_record, _list(data["links"], "links", origin)))
    if "numa_nodes" in data:
        given["numa_nodes"] = tuple(map(numa_node_from_record, _list(data["numa_nodes"], "numa_nodes", origin)))
    if "host" in data:
        given["host"] = str(data["host"] or "")
    for link in given.get("links", ()):
        for end in (link.source, link.target):
            if end not in inventory:
                raise InventoryError(
                    f"{origin} has a link that ends at {end!r}; its devices are {', '.join(inventory.names)}"
                )
    return replace(inventory, **given)


def _list(value: object, key: str, origin: str) -> list[object]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, Sequence):
        return list(value)
    raise InventoryError(f"{origin}: {key} must be a list, got {value!r}")
