"""The plan as people read it: a table of stages and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.plan.plan import Plan
from lightning_hetero.units import format_bytes

HEADER = ("stage", "device", "units", "parameters", "memory", "capacity", "used")


def stage_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row for each stage, under `HEADER`; idle devices and what the root holds besides come last."""
    rows: list[tuple[str, ...]] = []
    capacity = {device.name: device.memory_bytes for device in plan.devices}
    for index, stage in enumerate(plan.stages):
        rows.append(
            (
                str(index),
                stage.device,
                unit_range(stage.units),
                f"{stage.parameters:,}",
                *_memory(stage.need.total_bytes, capacity[stage.device]),
            )
        )
    if plan.loose.total_bytes:
        rows.append(
            (
                "",
                plan.root.name,
                "outside units",
                "",
                *_memory(plan.loose.total_bytes, capacity[plan.root.name]),
            )
        )
    used = {device.name for device in plan.used}
    for device in plan.devices:
        if device.name not in used:
            why = "idle" if device.trainable else "cannot train"
            rows.append(("", device.name, why, "0", "0 B", format_bytes(device.memory_bytes), "0 %"))
    return rows


def explain(plan: Plan) -> str:
    """The table and the reasons as plain text."""
    return "\n".join([title(plan), text_table(HEADER, stage_rows(plan)), *plan.notes])


def title(plan: Plan) -> str:
    """One line over the table."""
    counted = "parameters, gradients, optimizer state, buffers" if plan.training else "parameters, buffers"
    return f"Plan by policy {plan.policy!r}, root device {plan.root.name} (memory: {counted}; no activations)"


def unit_range(units: Sequence[str]) -> str:
    """`a … d (4)` for units a to d."""
    if not units:
        return "none"
    return units[0] if len(units) == 1 else f"{units[0]} … {units[-1]} ({len(units)})"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces, for logs and error messages."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _memory(need_bytes: int, capacity_bytes: int) -> tuple[str, str, str]:
    return format_bytes(need_bytes), format_bytes(capacity_bytes), f"{100 * need_bytes / capacity_bytes:.0f} %"
