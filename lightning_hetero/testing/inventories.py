"""Inventories of machines that nobody owns, for tests of plans and policies."""

from __future__ import annotations

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.units import parse_bytes


def inventory_of(*names: str, memory: int | str = "1GiB", **limits: int | str) -> Inventory:
    """An inventory with devices of these names.

    Args:
        names: Such as "cuda:0" and "cpu".
        memory: What each device has.
        limits: What single devices have instead, "cuda_0" standing for "cuda:0".
    """
    sizes = {name.replace("_", ":"): size for name, size in limits.items()}
    return Inventory(
        devices=tuple(
            DeviceSpec(
                name=name,
                kind=name.partition(":")[0],
                torch_device=name,
                memory_bytes=parse_bytes(sizes.get(name, memory)),
            )
            for name in names
        )
    )
