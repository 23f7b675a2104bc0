"""The inventory as a small table for people."""

from __future__ import annotations

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.units import format_bytes

INVENTORY_HEADER = ("device", "kind", "memory", "speed", "threads", "dtypes", "trains", "product")


def inventory_rows(inventory: Inventory) -> list[tuple[str, ...]]:
    """One row of texts per device, in the inventory's order, under `INVENTORY_HEADER`.

    Example:
        >>> inventory_rows(
        ...     Inventory(devices=(DeviceSpec(name="cpu", kind="cpu", memory_bytes=2**30, torch_device="cpu"),))
        ... )
        [('cpu', 'cpu', '1.00 GiB', '1', '', '?', 'yes', '')]
    """
    return [_row(device) for device in inventory]


def _row(device: DeviceSpec) -> tuple[str, ...]:
    usable = format_bytes(device.memory_bytes)
    total_bytes = device.total_memory_bytes

    return (
        device.name,
        device.kind,
        f"{usable} of {format_bytes(total_bytes)}" if total_bytes not in (None, device.memory_bytes) else usable,
        f"{device.speed:.3g}" if device.speed < 1000 else f"{device.speed:.0f}",
        "" if device.threads is None else str(device.threads),
        " ".join(device.dtypes) or "?",
        "yes" if device.trainable else "no",
        device.label,
    )
