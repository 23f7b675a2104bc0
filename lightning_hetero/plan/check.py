"""Checks a plan against its model and its devices before anything moves."""

from __future__ import annotations

from collections import Counter
from math import isfinite

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.plan.explain import text_table
from lightning_hetero.plan.forecast import FORWARD, WHOLE, DeviceForecast, Execution
from lightning_hetero.plan.plan import MemoryNeed, Plan
from lightning_hetero.units import format_bytes


def check_plan(plan: Plan, graph: ModelGraph) -> None:
    """Raise unless the plan places every unit once, on a device that can train, within its memory.

    Raises:
        PlacementError: A unit is missing, unknown or placed twice, tied units are apart, or a device is
            unknown or cannot train.
        InfeasiblePlanError: A device has less memory than the plan needs of it.
    """
    _check_units(plan, graph)
    _check_devices(plan)
    _check_shares(plan)
    _check_ties(plan, graph)
    check_memory(plan, graph)


def check_memory(plan: Plan, graph: ModelGraph) -> None:
    """Raise if some device has less memory than the plan needs of it: with activations if they were predicted.

    Raises:
        InfeasiblePlanError: With a table of need against limit, and the cheapest ways out.
    """
    over = [d for d in plan.devices if plan.need_of(d.name).total_bytes > d.memory_bytes]
    if not over:
        _check_peak(plan)
        return
    rows = [_memory_row(plan, device.name, device.memory_bytes) for device in plan.devices if device.trainable]
    worst = max(over, key=lambda d: plan.need_of(d.name).total_bytes - d.memory_bytes)
    need = plan.need_of(worst.name).total_bytes
    raise InfeasiblePlanError(
        f"the plan of policy {plan.policy!r} needs {format_bytes(need)} on {worst.name!r}, which has "
        f"{format_bytes(worst.memory_bytes)} (activations come on top).\n"
        + text_table(("device", "parameters", "gradients", "optimizer", "buffers", "needed", "limit", ""), rows)
        + f"\n{_largest(graph, plan)}\nTry: {'; '.join(_ways_out(plan))}."
    )


def _check_peak(plan: Plan) -> None:
    """Raise if what was predicted, with activations, is more than some device has."""
    if plan.forecast is None:
        return
    limit = {d.device: d.limit_bytes for d in plan.forecast.devices}
    limit |= {device.name: device.memory_bytes for device in plan.devices}
    over = [d for d in plan.forecast.devices if d.memory_bytes > limit[d.device]]
    if not over:
        return
    rows = [_peak_row(plan, device, limit[device.device]) for device in plan.forecast.devices]
    worst = max(over, key=lambda d: d.memory_bytes - limit[d.device])
    raise InfeasiblePlanError(
        f"the plan of policy {plan.policy!r} needs {format_bytes(worst.memory_bytes)} on {worst.device!r} at its peak, "
        f"which has {format_bytes(limit[worst.device])}.\n"
        + text_table(("device", "stays", "activations", "needed", "limit", ""), rows)
        + f"\nTry: {'; '.join([*_fewer_activations(plan.execution, plan.training), *_ways_out(plan)])}."
    )


def _peak_row(plan: Plan, device: DeviceForecast, limit_bytes: int) -> tuple[str, ...]:
    stays = plan.need_of(device.device).total_bytes
    parts = (stays, device.memory_bytes - stays, device.memory_bytes, limit_bytes)
    return device.device, *map(format_bytes, parts), _verdict(device.memory_bytes, limit_bytes)


def _fewer_activations(execution: Execution, training: bool) -> list[str]:
    """What keeps fewer activations, the cheapest first."""
    more = f"more micro-batches (now {execution.micro_batches})"
    if not training:
        return ["fewer rows in a batch"]
    if execution.schedule == WHOLE:
        ways = ["micro_batches=4 with rematerialize=True, which keeps activations of a part of the batch only"]
    elif execution.schedule == FORWARD and not execution.rematerialize:
        ways = ["rematerialize=True, which keeps activations of a few micro-batches only"]
    elif execution.schedule == "gpipe":
        ways = ["schedule='1f1b', which keeps activations of a few micro-batches only"]
    else:
        ways = [f"{more}, which makes each of those that are kept smaller"]
    return [*ways, "fewer rows in a batch, with accumulate_grad_batches to make up for it"]


def _check_units(plan: Plan, graph: ModelGraph) -> None:
    placed = Counter(unit for stage in plan.stages for unit in stage.units)
    unknown = [name for name in placed if name not in graph]
    if unknown:
        raise PlacementError(
            f"the plan places {unknown[0]!r}, which is no unit of this model. It was made for another model; "
            "make it again."
        )
    missing = [name for name in graph.names if name not in placed]
    if missing:
        raise PlacementError(f"the plan places no device for {_listing(missing)}; every unit needs one.")
    twice = [name for name, times in placed.items() if times > 1]
    if twice:
        raise PlacementError(f"the plan places {_listing(twice)} more than once; every unit has one place.")


def _check_devices(plan: Plan) -> None:
    inventory = plan.inventory
    able = ", ".join(device.name for device in inventory.trainable)
    for stage in plan.stages:
        if stage.device not in inventory:
            raise PlacementError(
                f"{_listing(stage.units)} would stand on {stage.device!r}, which is not in the inventory: {able}."
            )
        if plan.training and not inventory[stage.device].trainable:
            raise PlacementError(
                f"{_listing(stage.units)} would be trained on {stage.device!r}, a {inventory[stage.device].kind} "
                f"that PyTorch cannot train on; it can only run an exported model. Devices that can train: {able}."
            )


def _check_shares(plan: Plan) -> None:
    inventory = plan.inventory
    able = ", ".join(device.name for device in inventory.trainable)
    for stage in plan.stages:
        names = [share.device for share in stage.shares]
        if not names:
            continue
        if names[0] != stage.device or len(set(names)) != len(names):
            raise PlacementError(
                f"the replicas of {_listing(stage.units)} have to be on different devices, that of its parameters "
                f"({stage.device!r}) first; got {names}."
            )
        got = ", ".join(f"{share.device}: {share.share:g}" for share in stage.shares)
        if not all(share.share > 0 for share in stage.shares):
            raise PlacementError(
                f"every replica of {_listing(stage.units)} needs a share above 0, got {got}. Leave out who gets "
                "nothing."
            )
        if not isfinite(sum(share.share for share in stage.shares)):
            raise PlacementError(f"the shares of the replicas of {_listing(stage.units)} have no finite sum: {got}.")
        unable = [name for name in names if name not in inventory or not inventory[name].trainable]
        if plan.training and unable:
            raise PlacementError(
                f"a replica of {_listing(stage.units)} would be trained on {unable[0]!r}, which is no device that can "
                f"train here: {able}."
            )
    if plan.execution.micro_batches < 2 and any(stage.shares for stage in plan.stages):
        raise PlacementError(
            "replicas share a batch by its micro-batches, and there is only 1. Set micro_batches to at least the "
            "number of replicas."
        )


def _check_ties(plan: Plan, graph: ModelGraph) -> None:
    device_of = plan.device_of
    for unit in graph.units:
        if device_of[unit.name] != device_of[unit.tied_to]:
            raise PlacementError(
                f"{unit.name!r} on {device_of[unit.name]!r} shares a parameter with {unit.tied_to!r} on "
                f"{device_of[unit.tied_to]!r}. Put both on one device."
            )


def _memory_row(plan: Plan, name: str, limit_bytes: int) -> tuple[str, ...]:
    need: MemoryNeed = plan.need_of(name)
    parts = (need.parameters_bytes, need.gradients_bytes, need.optimizer_bytes, need.buffers_bytes)
    return (
        name,
        *(format_bytes(part) for part in parts),
        format_bytes(need.total_bytes),
        format_bytes(limit_bytes),
        _verdict(need.total_bytes, limit_bytes),
    )


def _verdict(need_bytes: int, limit_bytes: int) -> str:
    over = need_bytes - limit_bytes
    return f"{format_bytes(over)} too much" if over > 0 else "fits"


def _largest(graph: ModelGraph, plan: Plan) -> str:
    unit = max(graph.units, key=lambda u: u.parameter_bytes + u.buffer_bytes)
    factor = 2 + plan.optimizer_factor if plan.training else 1
    return (
        f"The largest unit, {unit.name!r} ({unit.kind}), takes about "
        f"{format_bytes(int(unit.parameter_bytes * factor) + unit.buffer_bytes)} and cannot be split."
    )


def _ways_out(plan: Plan) -> list[str]:
    free = sum(d.memory_bytes for d in plan.inventory.trainable)
    need = sum(plan.need_of(d.name).total_bytes for d in plan.devices)
    ways = []
    if need <= free and plan.policy != "memory_first":
        ways.append("placement='memory_first', which fills the devices under their limits")
    ways.append("more devices (devices='auto' takes all that this machine has) or higher memory limits")
    if plan.training and plan.optimizer_factor >= 1:
        ways.append("an optimizer with less state, such as SGD")
    if plan.training:
        ways.append("a 16-bit precision such as precision='bf16-true'")
    return ways


def _listing(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
