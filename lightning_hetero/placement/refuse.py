"""The error for problems without a placement that fits: a table of need against limit, and the ways out."""

from __future__ import annotations

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.explain import text_table
from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution, Forecast
from lightning_hetero.units import format_bytes


def infeasible(problem: Problem, forecast: Forecast, execution: Execution, policy: str) -> InfeasiblePlanError:
    """The error, with the placement that comes nearest to fitting as its example.

    Args:
        problem: What had to be placed.
        forecast: What the placement needs.
        execution: How it would run.
        policy: Who made it.
    """
    over = max(forecast.devices, key=lambda device: device.memory_bytes / device.limit_bytes)
    rows = [
        (
            device.device,
            format_bytes(device.memory_bytes),
            format_bytes(device.limit_bytes),
            f"{format_bytes(device.memory_bytes - device.limit_bytes)} too much"
            if device.memory_bytes > device.limit_bytes
            else "fits",
        )
        for device in forecast.devices
    ]
    return InfeasiblePlanError(
        f"placement {policy!r} found no plan that fits. The nearest one ({in_words(execution)}) needs "
        f"{format_bytes(over.memory_bytes)} on {over.device!r}, which has {format_bytes(over.limit_bytes)}; "
        f"activations are counted.\n{text_table(('device', 'needed', 'limit', ''), rows)}\n"
        f"Try: {'; '.join(_ways_out(problem, execution, policy))}."
    )


def in_words(execution: Execution) -> str:
    """How a batch runs, for tables and sentences: "whole", "8 micro-batches, forward, rematerialized"."""
    if execution.schedule == WHOLE:
        return WHOLE
    count = "1 micro-batch" if execution.micro_batches == 1 else f"{execution.micro_batches} micro-batches"
    return f"{count}, {execution.schedule}" + (", rematerialized" if execution.rematerialize else "")


def _ways_out(problem: Problem, execution: Execution, policy: str) -> list[str]:
    """The cheapest first: those that change no result and need no hardware."""
    rules, ways = problem.constraints, []
    if policy != "auto":
        ways.append("placement='auto', which looks at all policies")
    if problem.training and problem.rematerialize is False and FORWARD in problem.schedules:
        ways.append("rematerialize=True, which keeps no activations")
    rows = problem.profile.rows if problem.profile else 1
    if problem.micro_batches is not None and problem.micro_batches < rows:
        ways.append(f"more micro-batches than {problem.micro_batches}")
    elif problem.profile is not None and execution.schedule in (WHOLE, FORWARD) and problem.training:
        ways.append("a schedule of steps such as '1f1b', which keeps the activations of few micro-batches")
    named = [name for name in ("pins", "together", "forbidden", "trusted") if getattr(rules, name)]
    if named:
        ways.append(f"looser constraints ({', '.join(named)})")
    ways.append("more devices (devices='auto' takes all that this machine has) or higher memory limits")
    if problem.training and problem.optimizer_factor >= 1:
        ways.append("an optimizer with less state, such as SGD")
    ways.append("smaller batches, or a 16-bit precision such as precision='bf16-true'")
    return ways
