"""The most memory that each device needs in a step; rather too much than too little."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution
from lightning_hetero.profile.costs import Line
from lightning_hetero.schedule import Pipeline, bounds, get_schedule
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.route import Route, trained_bytes


def peak_bytes(
    costs: Costs, route: Route, device_of: Mapping[str, str], execution: Execution, rows: Sequence[int]
) -> dict[int, int]:
    """Peak memory by index of the device: of those with units, and of the root.

    Counted are parameters, gradients, optimizer state and buffers; what autograd keeps of the micro-batches in flight,
    inputs of units too; tensors on their way through the root; the joined output of "forward" and its gradient; and
    the most that a unit needs for a moment. Where parts of gradients are summed, those of other lanes wait for their
    turn, of parameters and at borders of stages, and each sum is a new tensor at first. The optimizer's step has a
    moment of its own: on accelerators torch works on copies of all parameters.

    A tensor that several units take is counted for each of them.

    Args:
        costs: Of the model.
        route: Its stages.
        device_of: Device name of each unit.
        execution: How it runs.
        rows: Rows of every micro-batch, the largest first.
    """
    resident = _resident(costs, device_of)
    total = list(resident)
    root, everything = costs.root, len(rows)
    in_steps = execution.schedule not in (WHOLE, FORWARD)
    work = _Work(rows)
    held = _held(route, execution, everything)
    kept, waiting = _kept(costs, route, work, held), _waiting(route, work, everything)
    for device in range(len(total)):
        if not costs.training:
            total[device] += waiting[device]
        elif execution.rematerialize:  # the forward keeps no graph, and is over before the backward makes one
            total[device] += max(kept[device], waiting[device])
        else:
            total[device] += kept[device]
    # Own code and the loss see the whole batch, or a part of it in the schedules of steps.
    parts = max(held, default=1) if in_steps else everything
    through, given = _at_root(costs, route)
    total[root] += work.bytes_of(given, everything) + work.bytes_of(through + route.outputs, parts)
    total[root] += work.bytes_of(costs.profile.own_code.saved_bytes, parts) if costs.training else 0.0
    if everything > 1 and not in_steps:
        leaving = sum((flow.size_bytes for flow in costs.flows if flow.target < 0), Line())
        total[root] += work.bytes_of(leaving, everything) * (2 if costs.training else 1)
    lanes = min(len(route.devices) + 1, everything)
    for device, size_bytes in _temporary(costs, route, rows, in_steps, lanes).items():
        total[device] += size_bytes
    if costs.training and everything > 1:
        for run in route.runs:
            total[run.device] += (lanes - 1) * sum(costs.trained_bytes[run.first : run.stop])
        for move in route.moves:
            for device in (move.sender, move.receiver) if move.comes_back else ():
                total[device] += 2 * work.bytes_of(move.size_bytes, lanes)  # as it comes and as it goes
    for device, size_bytes in trained_bytes(costs, route).items():
        if costs.inventory.devices[device].torch_device != "cpu":  # there torch's optimizers copy all at once
            total[device] = max(total[device], resident[device] + size_bytes)
    used = {*route.devices, root, *(device for device, size_bytes in enumerate(total) if size_bytes)}
    return {device: math.ceil(total[device]) for device in sorted(used)}


class _Work:
    """Bytes of the largest micro-batches together."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = (0, *accumulate(rows))

    def bytes_of(self, line: Line, in_flight: int) -> float:
        return line.fixed * in_flight + line.per_row * self._rows[in_flight]


def _resident(costs: Costs, device_of: Mapping[str, str]) -> list[float]:
    """What stays on each device through a whole run, by index."""
    total = dict.fromkeys(costs.devices, 0.0)
    for name, size_bytes in costs.state_bytes.items():
        total[device_of[name]] += size_bytes
    total[costs.devices[costs.root]] += costs.loose_bytes
    return [*total.values()]


def _kept(costs: Costs, route: Route, work: _Work, held: Sequence[int]) -> list[float]:
    """What autograd keeps on each device of the micro-batches that are held at once, by index."""
    total = [0.0] * len(costs.devices)
    for run, in_flight in zip(route.runs, held, strict=True):
        for unit in range(run.first, run.stop):
            total[run.device] += work.bytes_of(costs.kept[unit], in_flight)
    return total


def _waiting(route: Route, work: _Work, micro_batches: int) -> Mapping[int, float]:
    """Inputs of all micro-batches in front of the stages of each device, where no graph is kept."""
    total: defaultdict[int, float] = defaultdict(float)
    for move in route.moves:
        if move.enters:
            total[move.receiver] += work.bytes_of(move.size_bytes, micro_batches)
    return total


def _held(route: Route, execution: Execution, micro_batches: int) -> list[int]:
    """How many micro-batches each stage keeps something of at once, in training."""
    count = len(route.runs)
    if execution.schedule == WHOLE:
        return [1] * count
    if execution.schedule == FORWARD:
        lanes = len(route.devices) + 1 if execution.rematerialize else micro_batches
        return [min(lanes, micro_batches)] * count
    if not count:
        return []
    pipeline = Pipeline(device_of=tuple(run.device for run in route.runs), micro_batches=micro_batches)
    return list(bounds(get_schedule(execution.schedule), pipeline))


def _at_root(costs: Costs, route: Route) -> tuple[Line, Line]:
    """What passes through the root from unit to unit, and the batch itself."""
    through, given = Line(), Line()
    for move in route.moves:
        if move.given:
            given += move.size_bytes
        elif move.receiver == costs.root and not move.enters:
            through += move.size_bytes
    return through, given


def _temporary(costs: Costs, route: Route, rows: Sequence[int], in_steps: bool, lanes: int) -> dict[int, float]:
    """The most that a unit, or own code, needs for a moment, by index of the device.

    In training that of all lanes: a device works on one at a time, but what it made for one may be held elsewhere.
    """
    at_once = sum(rows[:lanes]) if costs.training else rows[0]
    most = {costs.root: costs.profile.own_code.temporary_bytes(rows[0] if in_steps else sum(rows))}
    sums_gradients = costs.training and len(rows) > 1
    for run in route.runs:
        for unit in range(run.first, run.stop):
            size_bytes = costs.units[unit].temporary_bytes(at_once)
            if sums_gradients:
                size_bytes += 2 * costs.trained_bytes[unit]
            if not costs.training:  # then its inputs are there for this moment only
                size_bytes += costs.inputs[unit](rows[0])
            most[run.device] = max(most.get(run.device, 0.0), size_bytes)
    return most
