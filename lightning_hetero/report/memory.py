"""What fills the memory of every device, against what a plan may use of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.plan import Plan
from lightning_hetero.report.bars import Bar, stacked
from lightning_hetero.report.theme import MEMORY, Theme
from lightning_hetero.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def memory_bars(plan: Plan, inventory: Inventory | None = None, *, theme: str | Theme = "light") -> Figure:
    """Draw one bar for each device, as parts of its capacity; a bar beyond the dashed line does not fit.

    Activations are what the forecast of the plan says beyond what stays through a run; without one there are none.

    Args:
        plan: What is placed.
        inventory: Capacities and product names, where they are not those of the plan.
        theme: "light" or "dark".

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: There is no such theme.
        InventoryError: The inventory lacks a device of the plan.
    """
    bars = [_bar(plan, device if inventory is None else inventory[device.name]) for device in plan.devices]
    counted = "" if plan.forecast is not None else "; activations are not known"
    return stacked(f"Memory of {plan.policy!r}, in percent of what may be used{counted}", bars, MEMORY, theme)


def device_memory(plan: Plan, device: str) -> dict[str, int]:
    """Bytes on a device by what they are for, the keys of `theme.MEMORY`; zeros are left out."""
    need = plan.need_of(device)
    peak_bytes = max(
        (each.memory_bytes for each in (plan.forecast.devices if plan.forecast else ()) if each.device == device),
        default=0,
    )
    parts = {
        "parameters": need.parameters_bytes,
        "gradients": need.gradients_bytes,
        "optimizer": need.optimizer_bytes,
        "buffers": need.buffers_bytes,
        "activations": max(0, peak_bytes - need.total_bytes),
    }
    return {what: size for what, size in parts.items() if size}


def _bar(plan: Plan, device: DeviceSpec) -> Bar:
    sizes = device_memory(plan, device.name)
    total = sum(sizes.values())
    parts = {what: size / device.memory_bytes for what, size in sizes.items()}
    over = "!" if total > device.memory_bytes else ""
    return Bar(device.name, f"{format_bytes(total)} of {format_bytes(device.memory_bytes)}{over}", parts)
