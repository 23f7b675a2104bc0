"""The most memory that each device needs in a step; rather too much than too little."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution
from lightning_hetero.profile.costs import Line
from lightning_hetero.schedule import Pipeline, bounds, get_schedule
from lightning_hetero.simulate.at_work import Work, at_work
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.rerun import Piece
from lightning_hetero.simulate.route import Route, trained_bytes

_COMPARED = 5  # outputs of the whole batch that a trial holds at once: of the whole, of parts, joined, with other rows
_COPIED = 3  # inputs of the whole batch likewise: a copy, one with other rows, and both in halves


def peak_bytes(
    costs: Costs,
    route: Route,
    device_of: Mapping[str, str],
    execution: Execution,
    rows: Sequence[int],
    pieces: Sequence[Piece] = (),
) -> dict[int, int]:
    """Peak memory by index of the device: of those with units, and of the root.

    Counted are parameters, gradients, optimizer state and buffers; what autograd keeps of the micro-batches in flight,
    inputs of units too; what the unit at work needs for a moment, with what is kept of the units before it (what is
    kept of those behind it is gone by its backward); tensors on their way through the root; the joined output of
    "forward" and its gradient. Where parts of gradients are summed, the sums are new tensors at first, and at borders
    of stages the gradients of other lanes wait. The optimizer's step has a moment of its own: on accelerators torch
    works on copies of all parameters.

    Args:
        costs: Of the model.
        route: Its stages.
        device_of: Device name of each unit.
        execution: How it runs.
        rows: Rows of every micro-batch, the largest first.
        pieces: What activation checkpointing runs again.
    """
    resident = resident_bytes(costs, device_of)
    total = list(resident)
    root, everything = costs.root, len(rows)
    in_steps = execution.schedule not in (WHOLE, FORWARD)
    work = Work(rows)
    held = in_flight(route, execution, everything)
    lanes = min(len(route.devices) + 1, everything)
    waiting = _waiting(route, work, everything)
    own, parts = costs.profile.own_code, max(held, default=1) if in_steps else everything
    own_bytes = own.temporary_bytes(rows[0] if in_steps else sum(rows))
    if costs.training:
        most = at_work(costs, route, device_of, work, held, own_bytes, pieces)
    else:
        most = _inference(costs, route, rows)
        total[root] += own_bytes
    for device in range(len(total)):
        if not costs.training:
            total[device] += most.get(device, 0.0) + waiting[device]
        elif execution.rematerialize:  # the forward keeps no graph, and is over before the backward makes one
            total[device] += max(most.get(device, 0.0), waiting[device])
        else:
            total[device] += most.get(device, 0.0)
    # Own code and the loss see the whole batch, or a part of it in the schedules of steps.
    through, given = _at_root(costs, route)
    total[root] += work.bytes_of(given, everything)
    if in_steps and costs.training:
        for device, size_bytes in _early(costs, route, work, held, everything):
            total[device] += size_bytes
    # Where nothing is cut, a tensor has gone on when the next one comes.
    total[root] += sum(work.bytes_of(size, parts) for size in (through if work.is_cut else through[:1]))
    if costs.training:
        total[root] += work.bytes_of(own.saved_bytes, parts)
        if not work.is_cut and route.runs and route.runs[-1].device == root:
            total[root] -= work.bytes_of(own.saved_output_bytes, parts)
    else:
        total[root] += work.bytes_of(route.outputs, parts)
    if work.is_cut and not in_steps:
        leaving = sum((flow.size_bytes for flow in costs.flows if flow.target < 0), Line())
        total[root] += work.bytes_of(leaving, everything) * (2 if costs.training else 1)
    if costs.training and work.is_cut:
        for run in route.runs:
            for unit in range(run.first, run.stop):
                # Of what is called once, lanes bring gradients in order: there is the sum, and one more to add. Else
                # each lane may have a sum of its own.
                sets = 2 if costs.units[unit].calls == 1 else lanes + 1
                # What is resident has room for one set: for that of the batch before, or for the sum of this one.
                sets = min(sets, everything + 1) - (not in_steps and not costs.accumulates)
                total[run.device] += sets * costs.trained_bytes[unit]
        for device, size in _gradients_on_their_way(route, max(rows)).items():
            total[device] += work.bytes_of(size, lanes)
    if work.is_cut and not in_steps:
        for device, size_bytes in _trial(costs, route, sum(rows)).items():
            total[device] = max(total[device], resident[device] + size_bytes)
    for device, size_bytes in trained_bytes(costs, route).items():
        if costs.inventory.devices[device].torch_device != "cpu":  # there torch's optimizers copy all at once
            total[device] = max(total[device], resident[device] + size_bytes)
    used = {*route.devices, root, *(device for device, size_bytes in enumerate(total) if size_bytes)}
    return {device: math.ceil(total[device]) for device in sorted(used)}


def resident_bytes(costs: Costs, device_of: Mapping[str, str]) -> list[float]:
    """What stays on each device through a whole run, by index."""
    total = dict.fromkeys(costs.devices, 0.0)
    for name, size_bytes in costs.state_bytes.items():
        total[device_of[name]] += size_bytes
    total[costs.devices[costs.root]] += costs.loose_bytes
    return [*total.values()]


def _waiting(route: Route, work: Work, micro_batches: int) -> Mapping[int, float]:
    """Inputs of all micro-batches in front of the stages of each device, where no graph is kept."""
    total: defaultdict[int, float] = defaultdict(float)
    for move in route.moves:
        if move.enters:
            total[move.receiver] += work.bytes_of(move.size_bytes, micro_batches)
    return total


def _early(
    costs: Costs, route: Route, work: Work, held: Sequence[int], micro_batches: int
) -> Iterator[tuple[int, float]]:
    """Inputs of micro-batches that a stage has not begun, by device: from the stage before, and of the batch.

    The batch is there from the beginning to the end of the step.
    """
    for move in route.moves:
        if move.enters and move.stage and not move.given:
            # One more may be on its way while the last one is let go of.
            count = min(max(held[move.stage - 1] - held[move.stage], 0) + 1, micro_batches)
            yield move.receiver, work.bytes_of(move.size_bytes, count)
    stage_of = [stage for stage, run in enumerate(route.runs) for _ in range(run.first, run.stop)]
    for flow in costs.flows:
        if flow.source < 0 <= flow.target and not flow.has_gradient:
            stage = stage_of[flow.target]
            if route.runs[stage].device == costs.root:
                counted = work.bytes_of(flow.size_bytes, held[stage])
                yield costs.root, work.bytes_of(flow.size_bytes, micro_batches) - counted


def in_flight(route: Route, execution: Execution, micro_batches: int) -> list[int]:
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
    # As many as are under way may be at any stage: a schedule says which of them goes first, and no more.
    return [bounds(get_schedule(execution.schedule), pipeline)[0]] * count


def _at_root(costs: Costs, route: Route) -> tuple[list[Line], Line]:
    """What passes through the root from unit to unit, the largest first, and the batch itself."""
    through = [m.size_bytes for m in route.moves if not m.given and m.receiver == costs.root and not m.enters]
    given = sum((move.size_bytes for move in route.moves if move.given), Line())
    return sorted(through, key=lambda size: size(costs.profile.rows), reverse=True), given


def _gradients_on_their_way(route: Route, rows: int) -> dict[int, Line]:
    """The most of gradients that wait on a device for one micro-batch, which is between two stages at a time."""
    most: dict[int, Line] = {}
    for stage, run in enumerate(route.runs):
        sizes: defaultdict[int, list[Line]] = defaultdict(list)
        for move in route.moves:
            if move.comes_back and move.stage == stage:
                sizes[move.sender if move.enters else move.receiver].append(move.size_bytes)
        for device, lines in sizes.items():
            # Of a stage that runs in several pieces, only those of one piece, which rarely has more than two.
            lines.sort(key=lambda size: size(rows), reverse=True)
            size = sum(lines if run.calls == 1 else lines[:2], Line())
            most[device] = max(most.get(device, Line()), size, key=lambda size: size(rows))
    return most


def _trial(costs: Costs, route: Route, rows: int) -> dict[int, float]:
    """What the trial before the first cut needs: it runs the region whole and in parts, and compares what comes out."""
    where = [run.device for run in route.runs for _ in range(run.first, run.stop)]
    most = _inference(costs, route, [rows])
    for flow in costs.flows:
        if flow.target < 0 <= flow.source:
            device = where[flow.source] if flow.source in costs.in_chain else costs.root
            most[device] = most.get(device, 0.0) + _COMPARED * flow.size_bytes(rows)
        elif flow.source < 0:
            most[costs.root] = most.get(costs.root, 0.0) + _COPIED * flow.size_bytes(rows)
    return most


def _inference(costs: Costs, route: Route, rows: Sequence[int]) -> dict[int, float]:
    """The most that a unit needs for a moment, with its inputs, by index of the device, where nothing is kept."""
    most: defaultdict[int, float] = defaultdict(float)
    for run in route.runs:
        for unit in range(run.first, run.stop):
            cost = costs.units[unit]
            alone = cost.temporary_bytes if cost.inference_bytes is None else cost.inference_bytes
            size_bytes = (alone + costs.inputs[unit])(rows[0])
            most[run.device] = max(most[run.device], size_bytes)
    return most
