"""Predicts a plan: seconds of a step, what every device does when, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_hetero.errors import ScheduleError
from lightning_hetero.plan.forecast import FORWARD, WHOLE, DeviceForecast, Execution, Forecast
from lightning_hetero.schedule import TRANSFER, Timeline
from lightning_hetero.schedule.rows import split_rows
from lightning_hetero.simulate.cost import StageCost
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.price import Price, price, stage_costs
from lightning_hetero.simulate.replicas import SharesOf, Way, add_exchange, peak_of_ways, ways_of
from lightning_hetero.simulate.rerun import Piece, pieces_to_rerun
from lightning_hetero.simulate.route import Route, route, trained_bytes
from lightning_hetero.simulate.run import OPTIMIZER, Slot, run_step, run_steps_schedule
from lightning_hetero.simulate.step import as_timeline


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is known of a plan before it runs.

    Attributes:
        forecast: Seconds of a step and memory, in short.
        stages: The stages in the order of calls, as they cost for the largest micro-batch. What leaves a stage and what
            enters the next one are one transfer here.
        fits: Whether no device needs more memory than the plan may use of it.
        slots: What the timeline is made of.
    """

    forecast: Forecast
    stages: tuple[StageCost, ...]
    fits: bool
    slots: tuple[Slot, ...]

    @cached_property
    def timeline(self) -> Timeline:
        """What every device does when, optimizer included; made when it is asked for."""
        return as_timeline(self.slots, tuple(device.device for device in self.forecast.devices))


def predict(
    costs: Costs,
    device_of: Mapping[str, str],
    execution: Execution,
    shares_of: SharesOf | None = None,
    checkpointed: Collection[str] = (),
) -> Prediction:
    """Predict one step of a placed model.

    A batch that is not cut runs "whole": one row, one micro-batch, "forward" with all units on one device, or with rows
    that depend on each other.
    Transfers occupy the device of the module at whose border they are, since the runtime has no side streams. Devices
    make their optimizer steps one after the other, as torch does.

    Args:
        costs: Of the model on these devices.
        device_of: Device name of every unit of the graph; of one with replicas, that of the owner.
        execution: How a batch runs; of the schedules, "forward" only if there are replicas.
        shares_of: The replicas of units that have some, the owner first.
        checkpointed: Units with activation checkpointing, which have no replicas.

    Raises:
        PlacementError: A unit has no device, or one that is not in the inventory.
        ProfileError: The profile knows no seconds of a unit on its device.
        ScheduleError: There is no schedule of that name, or it is not predicted with replicas.
    """
    shares_of = shares_of or {}
    if shares_of and execution.schedule != FORWARD:
        raise ScheduleError(
            f"plans with replicas are predicted for the schedule {FORWARD!r} only, and this one has "
            f"{execution.schedule!r}"
        )
    owners = route(costs, device_of)
    execution, shares_of = as_run(costs, owners, execution, shares_of)
    rows = split_rows(costs.profile.rows, execution.micro_batches, execution.weights)
    ways = ways_of(costs, device_of, owners, shares_of, rows)
    pieces = pieces_to_rerun(costs, device_of, checkpointed) if costs.training else ()
    prices = _prices(costs, ways, rows, execution, pieces)
    if execution.schedule in (WHOLE, FORWARD):
        used = {device for way in ways for device in way.route.devices}
        slots, end_s = run_step(costs, prices, execution, len(used))
    else:
        slots, end_s = run_steps_schedule(costs, prices, execution)
    end_s = add_exchange(costs, device_of, shares_of, slots, end_s)
    end_s = _optimize(costs, owners, slots, end_s)
    memory = peak_of_ways(costs, device_of, shares_of, execution, ways, pieces)
    forecast = _forecast(costs, prices, slots, end_s, memory)
    return Prediction(
        forecast=forecast,
        stages=stage_costs(costs, prices[0]),
        fits=all(device.memory_bytes <= device.limit_bytes for device in forecast.devices),
        slots=tuple(slots),
    )


def _prices(
    costs: Costs, ways: Sequence[Way], rows: Sequence[int], execution: Execution, pieces: Sequence[Piece]
) -> list[Price]:
    """What each micro-batch costs; the same object for equal ones."""
    overhead_s = 0.0 if execution.schedule == WHOLE else costs.profile.call_overhead_s
    sums = 1 - 1 / len(rows)  # a micro-batch in the middle stands for all of them
    known: dict[tuple[int, int], Price] = {}
    for way, count in zip(ways, rows, strict=True):
        if (id(way), count) not in known:
            known[id(way), count] = price(costs, way.route, count, overhead_s, sums, pieces)
    return [known[id(way), count] for way, count in zip(ways, rows, strict=True)]


def as_run(costs: Costs, way: Route, execution: Execution, shares_of: SharesOf) -> tuple[Execution, SharesOf]:
    """What the runtime makes of it: nothing is cut where there is no border, or no second row.

    Args:
        costs: Of the model.
        way: The stages on their owners.
        execution: How a batch is to run.
        shares_of: The replicas.
    """
    if execution.schedule == FORWARD and costs.is_coupled:  # the owners do all
        return Execution(), {}
    if shares_of:
        return execution, shares_of
    is_alone = len(way.devices) < 2 or execution.micro_batches < 2 or costs.profile.rows < 2
    return Execution() if is_alone else execution, {}


def _optimize(costs: Costs, way: Route, slots: list[Slot], now_s: float) -> float:
    """Add the optimizer's steps; when the last one ends."""
    for device, size_bytes in trained_bytes(costs, way).items():
        seconds = costs.optimizer_s(device, size_bytes)
        if seconds:
            slots.append(Slot(costs.devices[device], OPTIMIZER, now_s, seconds, None, None))
            now_s += seconds
    return now_s


def _forecast(
    costs: Costs,
    prices: Sequence[Price],
    slots: Sequence[Slot],
    step_s: float,
    memory: Mapping[int, int],
) -> Forecast:
    work_s = dict.fromkeys(costs.devices, 0.0)
    optimizer_s = dict.fromkeys(costs.devices, 0.0)
    for slot in slots:
        if slot.op == OPTIMIZER:
            optimizer_s[slot.device] += slot.duration_s
        elif slot.op != TRANSFER:
            work_s[slot.device] += slot.duration_s
    links: dict[tuple[int, int], float] = {}
    for each in prices:
        for pair, seconds in each.link_s.items():
            links[pair] = links.get(pair, 0.0) + seconds
    incoming_s = [0.0] * len(costs.devices)
    for (_, receiver), seconds in links.items():
        incoming_s[receiver] += seconds
    limits = costs.limits
    devices = tuple(
        DeviceForecast(
            device=costs.devices[index],
            busy_s=work_s[costs.devices[index]] + optimizer_s[costs.devices[index]],
            transfer_s=incoming_s[index],
            memory_bytes=size_bytes,
            limit_bytes=limits[index],
        )
        for index, size_bytes in memory.items()
    )
    loads = {f"compute of {name}": seconds for name, seconds in work_s.items()}
    loads |= {f"link {costs.devices[a]} -> {costs.devices[b]}": seconds for (a, b), seconds in links.items()}
    loads["the optimizer"] = sum(optimizer_s.values())
    return Forecast(
        step_s=step_s,
        devices=devices,
        bottleneck=max(loads, key=lambda what: loads[what]),
        estimated=costs.profile.estimated,
    )
