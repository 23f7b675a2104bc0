"""Devices of a machine dealt out to the processes on it."""

from __future__ import annotations

from dataclasses import replace

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import InventoryError


def devices_of_process(inventory: Inventory, index: int, processes: int) -> Inventory:
    """What one of several processes on a machine may use: accelerators of its own, and a part of the CPU's memory.

    Args:
        inventory: The devices of the machine.
        index: Of the process among those on the machine, from 0.
        processes: How many there are.

    Raises:
        InventoryError: Nothing is left for this process.
    """
    if processes < 2:
        return inventory
    accelerators = [device for device in inventory if device.kind != "cpu"]
    own = {device.name for device in accelerators[index::processes]}
    devices = tuple(
        replace(device, memory_bytes=device.memory_bytes // processes) if device.kind == "cpu" else device
        for device in inventory
        if device.kind == "cpu" or device.name in own
    )
    if not devices:
        raise InventoryError(
            f"{processes} processes run on this machine, and its {len(accelerators)} devices "
            f"({', '.join(inventory.names)}) are not enough for all of them. Start at most {len(accelerators)}, or let "
            "those without an accelerator use the CPU."
        )
    return replace(
        inventory,
        devices=devices,
        links=tuple(
            link for link in inventory.links if {link.source, link.target} <= {device.name for device in devices}
        ),
    )
