"""The most memory that each device needs in a step; rather too much than too little."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution
from lightning_hetero.profile.costs import Line
from lightning_hetero.schedule import Pipeline, bounds, get_schedule
from lightning_hetero.simulate.costs import Costs, Flow
from lightning_hetero.simulate.route import Route, trained_bytes

_COMPARED = 5  # outputs of the whole batch that a trial holds at once: of the whole, of parts, joined, with other rows


def peak_bytes(
    costs: Costs, route: Route, device_of: Mapping[str, str], execution: Execution, rows: Sequence[int]
) -> dict[int, int]:
    """Peak memory by index of the device: of those with units, and of the root.

    Counted are parameters, gradients, optimizer state and buffers; what autograd keeps of the micro-batches in flight,
    inputs of units too; what the unit at work needs for a moment, with what is kept of the units before it (what is
    kept of those behind it is gone by its backward); tensors on their way through the root; the joined output of
    "forward" and its gradient. Where parts of gradients are summed, those of other lanes wait for their turn, of
    parameters and at borders of stages, and the sums are new tensors at first. The optimizer's step has a moment of
    its own: on accelerators torch works on copies of all parameters.

    Args:
        costs: Of the model.
        route: Its stages.
        device_of: Device name of each unit.
        execution: How it runs.
        rows: Rows of every micro-batch, the largest first.
    """
    resident = resident_bytes(costs, device_of)
    total = list(resident)
    root, everything = costs.root, len(rows)
    in_steps = execution.schedule not in (WHOLE, FORWARD)
    work = _Work(rows)
    held = _held(route, execution, everything)
    lanes = min(len(route.devices) + 1, everything)
    waiting = _waiting(route, work, everything)
    own, parts = costs.profile.own_code, max(held, default=1) if in_steps else everything
    own_bytes = own.temporary_bytes(rows[0] if in_steps else sum(rows))
    if costs.training:
        at_work = _at_work(costs, route, device_of, work, held, own_bytes)
    else:
        at_work = _inference(costs, route, rows)
        total[root] += own_bytes
    for device in range(len(total)):
        if not costs.training:
            total[device] += at_work.get(device, 0.0) + waiting[device]
        elif execution.rematerialize:  # the forward keeps no graph, and is over before the backward makes one
            total[device] += max(at_work.get(device, 0.0), waiting[device])
        else:
            total[device] += at_work.get(device, 0.0)
    # Own code and the loss see the whole batch, or a part of it in the schedules of steps.
    through, given = _at_root(costs, route)
    total[root] += work.bytes_of(given, everything)
    # Where nothing is cut, a tensor has gone on when the next one comes.
    total[root] += sum(work.bytes_of(size, parts) for size in (through if work.is_cut else through[:1]))
    if costs.training:
        total[root] += work.bytes_of(own.saved_bytes, parts)
    else:
        total[root] += work.bytes_of(route.outputs, parts)
    if work.is_cut and not in_steps:
        leaving = sum((flow.size_bytes for flow in costs.flows if flow.target < 0), Line())
        total[root] += work.bytes_of(leaving, everything) * (2 if costs.training else 1)
    if costs.training and work.is_cut:
        for run in route.runs:
            total[run.device] += lanes * sum(costs.trained_bytes[run.first : run.stop])
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


class _Work:
    """Bytes of the largest micro-batches together."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = (0, *accumulate(rows))
        self.is_cut = len(rows) > 1

    def bytes_of(self, line: Line, in_flight: int) -> float:
        return line.fixed * in_flight + line.per_row * self._rows[in_flight]


def resident_bytes(costs: Costs, device_of: Mapping[str, str]) -> list[float]:
    """What stays on each device through a whole run, by index."""
    total = dict.fromkeys(costs.devices, 0.0)
    for name, size_bytes in costs.state_bytes.items():
        total[device_of[name]] += size_bytes
    total[costs.devices[costs.root]] += costs.loose_bytes
    return [*total.values()]


def _at_work(
    costs: Costs,
    route: Route,
    device_of: Mapping[str, str],
    work: _Work,
    held: Sequence[int],
    own_bytes: float,
) -> dict[int, float]:
    """The most that autograd keeps and the unit at work needs, by index of the device, in training.

    The micro-batch at work has let go of what it kept of later units, or has not come to them yet; the others keep all.
    """
    kept, leaving = _kept(costs, route, device_of, work.is_cut)
    others: defaultdict[int, float] = defaultdict(float)
    before: defaultdict[int, float] = defaultdict(float)
    most: defaultdict[int, float] = defaultdict(float)
    for run, in_flight in zip(route.runs, held, strict=True):
        # What leaves a stage is held until the backward of the stage has ended.
        stays = sum(work.bytes_of(leaving[unit], 1) for unit in range(run.first, run.stop))
        for unit in range(run.first, run.stop):
            own = work.bytes_of(kept[unit], 1)
            others[run.device] += work.bytes_of(kept[unit], in_flight) - own
            before[run.device] += own
            stays -= work.bytes_of(leaving[unit], 1)
            cost = costs.units[unit]
            moment = max(work.bytes_of(line, 1) for line in (cost.temporary_bytes, cost.backward_bytes))
            most[run.device] = max(most[run.device], before[run.device] + stays + moment)
    # Own code has its moment on the root when everything is kept.
    most[costs.root] = max(most[costs.root], before[costs.root] + own_bytes)
    return {device: others[device] + most[device] for device in most}


def _kept(costs: Costs, route: Route, device_of: Mapping[str, str], cut: bool) -> tuple[list[Line], list[Line]]:
    """What is kept of each unit for one micro-batch, every tensor once on its device; and the part that leaves it.

    Where a batch is cut, inputs and outputs of what runs in one piece are kept in any case.
    """
    where = [run.device for run in route.runs for _ in range(run.first, run.stop)]
    is_block = [len({device_of[name] for name in names}) == 1 for names in costs.around]
    kept = [unit.saved_bytes.scaled(unit.calls) for unit in costs.units]
    leaving: list[set[tuple[Line, bool]]] = [set() for _ in costs.units]
    in_chain = {unit for flow in costs.flows if flow.chained for unit in (flow.source, flow.target)}
    for flow in costs.flows:
        here = where[flow.source] if flow.source >= 0 else costs.root
        there = where[flow.target] if flow.target >= 0 else costs.root
        inside = flow.chained or (flow.around >= 0 and is_block[flow.around])
        stays = here == there and (here == costs.root or inside)
        if flow.target >= 0:
            again = stays and flow.taken_before >= 0 and where[flow.taken_before] == there
            if not again and not (stays and flow.source >= 0 and _saves_output(costs, flow)):
                kept[flow.target] += flow.size_bytes.scaled(1.0 if cut and not inside else _saved_share(costs, flow))
        if cut and flow.source >= 0 and (here != there or flow.target < 0):
            if flow.chained or here == costs.root:
                leaving[flow.source].add((flow.size_bytes, _saves_output(costs, flow)))
            elif flow.source in in_chain:  # it goes to the root at the end of the chain, and its gradient comes there
                leaving[flow.source].add((flow.size_bytes.scaled(2.0), False))
    for unit, flows in enumerate(leaving):
        kept[unit] = sum((size for size, saved in flows if not saved), kept[unit])
    return kept, [sum((size for size, _ in flows), Line()) for flows in leaving]


def _saved_share(costs: Costs, flow: Flow) -> float:
    """The part of a unit's inputs that autograd keeps."""
    unit = costs.units[flow.target]
    if unit.saved_input_bytes is None:
        return 1.0
    rows = costs.profile.rows
    return min(1.0, unit.calls * unit.saved_input_bytes(rows) / max(costs.inputs[flow.target](rows), 1.0))


def _saves_output(costs: Costs, flow: Flow) -> bool:
    """Whether what flows is kept by the unit that made it anyway."""
    saved = costs.units[flow.source].saved_output_bytes.scaled(costs.units[flow.source].calls)
    size = flow.size_bytes
    return saved.fixed >= size.fixed and saved.per_row >= size.per_row and bool(size.fixed or size.per_row)


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
    in_chain = {unit for flow in costs.flows if flow.chained for unit in (flow.source, flow.target)}
    most = _inference(costs, route, [rows])
    for flow in costs.flows:
        if flow.target < 0 <= flow.source:
            device = where[flow.source] if flow.source in in_chain else costs.root
            most[device] = most.get(device, 0.0) + _COMPARED * flow.size_bytes(rows)
    return most


def _inference(costs: Costs, route: Route, rows: Sequence[int]) -> dict[int, float]:
    """The most that a unit needs for a moment, with its inputs, by index of the device, where nothing is kept."""
    most: defaultdict[int, float] = defaultdict(float)
    for run in route.runs:
        for unit in range(run.first, run.stop):
            size_bytes = costs.units[unit].temporary_bytes(rows[0]) + costs.inputs[unit](rows[0])
            most[run.device] = max(most[run.device], size_bytes)
    return most
