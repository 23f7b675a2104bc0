"""The plan as people read it: a table of stages and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.plan.forecast import WHOLE, Forecast
from lightning_hetero.plan.plan import Plan
from lightning_hetero.units import format_bytes

HEADER = ("stage", "device", "units", "parameters", "memory", "capacity", "used")
STAGE_HEADER = ("stage", "on", "forward", "backward", "keeps", "sends on")
DEVICE_HEADER = ("device", "computes", "slack", "receives", "peak memory", "capacity", "used")


def stage_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row for each stage and replica, under `HEADER`; idle devices and what the root holds besides come last."""
    rows: list[tuple[str, ...]] = []
    capacity = {device.name: device.memory_bytes for device in plan.devices}
    for index, stage in enumerate(plan.stages):
        total = sum(share.share for share in stage.shares)
        part = {share.device: f" ({_share(share.share, total)})" for share in stage.shares}
        for name in part or (stage.device,):
            rows.append(
                (
                    str(index),
                    name + part.get(name, ""),
                    unit_range(stage.units) + (", recomputed" if stage.activation_checkpointing else ""),
                    f"{stage.parameters:,}" if name == stage.device else "replica",
                    *_memory(stage.need_on(name).total_bytes, capacity[name]),
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
            why = "cannot train" if plan.training and not device.trainable else "idle"
            rows.append(("", device.name, why, "0", "0 B", format_bytes(device.memory_bytes), "0 %"))
    return rows


def explain(plan: Plan) -> str:
    """The table, what was predicted and rejected, and the reasons, as plain text."""
    return "\n".join([title(plan), text_table(HEADER, stage_rows(plan)), *outlook(plan), *plan.notes])


def outlook(plan: Plan) -> list[str]:
    """Lines about what the plan will take, how good it is, and what was rejected; none if nobody predicted it."""
    lines = []
    if plan.forecast is not None:
        lines += [_step(plan, plan.forecast), text_table(DEVICE_HEADER, device_rows(plan.forecast))]
        if plan.forecast.stages:
            lines.append(text_table(STAGE_HEADER, stage_forecast_rows(plan.forecast)))
    if plan.proof:
        lines.append(plan.proof)
    if plan.alternatives:
        rows = [(a.policy, _seconds_or_no(a.step_s), a.reason) for a in plan.alternatives]
        lines += ["Rejected:", text_table(("policy", "step", "why not"), rows)]
    return lines


def device_rows(forecast: Forecast) -> list[tuple[str, ...]]:
    """One row for each device that takes part, under `DEVICE_HEADER`. Slack is the time that it does not compute."""
    return [
        (
            device.device,
            format_seconds(device.busy_s),
            _share(forecast.step_s - device.busy_s, forecast.step_s),
            format_seconds(device.transfer_s),
            *_memory(device.memory_bytes, device.limit_bytes),
        )
        for device in forecast.devices
    ]


def stage_forecast_rows(forecast: Forecast) -> list[tuple[str, ...]]:
    """One row for each stage and replica, under `STAGE_HEADER`: what it does in a step, all micro-batches together."""
    return [
        (
            str(stage.stage),
            stage.device,
            format_seconds(stage.forward_s),
            format_seconds(stage.backward_s),
            format_bytes(stage.kept_bytes),
            format_bytes(stage.sent_bytes),
        )
        for stage in forecast.stages
    ]


def format_seconds(seconds: float) -> str:
    """Write a time for people, with three significant digits.

    Example:
        >>> format_seconds(0.01234), format_seconds(75), format_seconds(0)
        ('12.3 ms', '75.0 s', '0 s')
    """
    if seconds == 0:
        return "0 s"
    for unit, size_s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * size_s or unit == "us":
            break
    value = seconds / size_s
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


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


def _step(plan: Plan, forecast: Forecast) -> str:
    """One line over the table of devices."""
    execution = plan.execution
    how = "in one piece"
    if execution.schedule != WHOLE:
        how = f"{execution.micro_batches} micro-batches, schedule {execution.schedule!r}"
    how += ", forwards repeated in the backward" if execution.rematerialize else ""
    source = " from estimated costs" if forecast.estimated else ""
    return (
        f"Predicted{source}: {format_seconds(forecast.step_s)} a step ({how}), bound by {forecast.bottleneck} "
        "(peak memory: activations included)"
    )


def _seconds_or_no(seconds: float | None) -> str:
    return "does not fit" if seconds is None else format_seconds(seconds)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _memory(need_bytes: int, capacity_bytes: int) -> tuple[str, str, str]:
    return format_bytes(need_bytes), format_bytes(capacity_bytes), _share(need_bytes, capacity_bytes)
