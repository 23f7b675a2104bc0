"""What we have: the inventory of devices, how it is discovered and measured, and how a user asks for a part of it."""

from lightning_hetero.devices.discover import discover
from lightning_hetero.devices.emulated import format_emulation
from lightning_hetero.devices.files import save_inventory
from lightning_hetero.devices.measured import measured_inventory
from lightning_hetero.devices.resolve import DeviceRequest, resolve_devices
from lightning_hetero.devices.spec import DeviceSpec, Inventory, Link, NumaNode
from lightning_hetero.devices.table import INVENTORY_HEADER, inventory_rows

__all__ = [
    "INVENTORY_HEADER",
    "DeviceRequest",
    "DeviceSpec",
    "Inventory",
    "Link",
    "NumaNode",
    "discover",
    "format_emulation",
    "inventory_rows",
    "measured_inventory",
    "resolve_devices",
    "save_inventory",
]
