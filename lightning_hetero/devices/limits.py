"""Memory limits that a user puts on devices: {"cuda:0": "10GiB"}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_hetero.devices.lookup import find
from lightning_hetero.devices.request import torch_name
from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError
from lightning_hetero.units import format_bytes, parse_bytes


def limit_memory(inventory: Inventory, limits: Mapping[Any, Any]) -> Inventory:
    """The inventory under these limits.

    A limit may be more than what is usable now, since the user knows what will be freed, but not more
    than the device has.

    Args:
        inventory: The devices; left as it is.
        limits: Sizes by address ("cuda:0", "cuda:*", "gpu") or `torch.device`; None sets no limit.

    Raises:
        InventoryError: A device is unknown, or a limit is not a size or is more than the device has.
    """
    sizes: dict[str, int] = {}
    for key, size in limits.items():
        address = torch_name(key) or key
        if not isinstance(address, str):
            raise InventoryError(f"a memory limit for {key!r}: write the device's name, such as 'cuda:0'")
        devices = find(address, inventory)
        if size is None:
            continue
        for device in devices:
            if device.name in sizes:
                raise InventoryError(f"device {device.name!r} has two memory limits; leave one of them out")
            sizes[device.name] = _limit(device, size)
    return inventory.with_memory(sizes)


def check_fits(device: DeviceSpec, memory_bytes: int, has: DeviceSpec) -> None:
    """Refuse a limit above what the device has.

    Args:
        device: Whose memory is limited.
        memory_bytes: The limit.
        has: The device as discovered; its total may be unknown.

    Raises:
        InventoryError: It is above.
    """
    total_bytes = has.total_memory_bytes
    if total_bytes is not None and memory_bytes > total_bytes:
        raise InventoryError(
            f"the memory limit of {format_bytes(memory_bytes)} for {device.name!r} is more than the "
            f"{format_bytes(total_bytes)} that it has; write at most that, or leave the limit out to use "
            f"what is free ({format_bytes(has.memory_bytes)})"
        )


def _limit(device: DeviceSpec, size: object) -> int:
    try:
        if not isinstance(size, (int, float, str)):
            raise ValueError(f"{size!r} is not a size; write bytes or a text such as '24GiB'")
        memory_bytes = parse_bytes(size)
    except ValueError as error:
        raise InventoryError(f"the memory limit for {device.name!r}: {error}") from error
    if memory_bytes == 0:
        raise InventoryError(
            f"the memory limit for {device.name!r} is {size!r}; leave the device out of the request instead"
        )
    check_fits(device, memory_bytes, device)
    return memory_bytes
