"""What each stage of a plan will do in a step; asked of plans that were chosen, not of those that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_hetero.plan.forecast import WHOLE, StageForecast
from lightning_hetero.plan.plan import Plan
from lightning_hetero.schedule.rows import split_rows
from lightning_hetero.simulate.at_work import Work, kept_by_units
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.peak import in_flight
from lightning_hetero.simulate.predict import as_run
from lightning_hetero.simulate.replicas import ways_of
from lightning_hetero.simulate.rerun import pieces_to_rerun
from lightning_hetero.simulate.route import route


@dataclass(slots=True)
class _Sum:
    forward_s: float = 0.0
    backward_s: float = 0.0
    kept_bytes: float = 0.0
    sent_bytes: float = 0.0


def forecast_stages(costs: Costs, plan: Plan) -> tuple[StageForecast, ...]:
    """What the stages of a plan take, by the costs by which the whole of it was predicted.

    Stages of a plan follow each other by definition, those of a prediction in the order of calls, so the seconds are
    added up unit by unit. What the runtime adds to the calls of units that follow each other belongs to the first.

    Raises:
        PlacementError: A unit has no device, or one that is not in the inventory.
        ScheduleError: There is no schedule of that name.
    """
    device_of = plan.device_of
    owners = route(costs, device_of)
    execution, shares_of = as_run(costs, owners, plan.execution, plan.shares_of)
    rows = split_rows(costs.profile.rows, execution.micro_batches, execution.weights)
    overhead_s = 0.0 if execution.schedule == WHOLE else costs.profile.call_overhead_s / (2 if costs.training else 1)
    sums = 1 - 1 / len(rows)  # as in `predict`
    stage_of = {unit: index for index, stage in enumerate(plan.stages) for unit in stage.units}
    found: dict[tuple[int, str], _Sum] = {}
    for index, stage in enumerate(plan.stages):
        for name in [share.device for share in stage.shares if shares_of] or [stage.device]:
            found[index, name] = _Sum()

    def of(unit: int, device: int) -> _Sum:
        return found[stage_of[costs.units[unit].name], costs.devices[device]]

    pieces = pieces_to_rerun(costs, device_of, plan.checkpointed) if costs.training else ()
    runs_again = {unit for first, stop in pieces for unit in range(first, stop)}
    ways = ways_of(costs, device_of, owners, shares_of, rows)
    for way, count in zip(ways, rows, strict=True):
        seconds = costs.seconds(count)
        for device, first, stop, calls in way.route.runs:
            start = of(first, device)
            start.forward_s += overhead_s * calls
            if costs.training:  # with rematerialization, the calls of the forward are made once more
                start.backward_s += overhead_s * calls * (2 if execution.rematerialize else 1)
            for unit in range(first, stop):
                here, forward_s = of(unit, device), seconds.forward_s[device][unit]
                here.forward_s += forward_s
                if costs.training:
                    here.backward_s += seconds.backward_s[device][unit] + (
                        forward_s if execution.rematerialize or unit in runs_again else 0
                    )
                    here.backward_s += sums * costs.gradient_sum_s(device, costs.trained_bytes[unit])
        where = [run.device for run in way.route.runs for _ in range(run.first, run.stop)]
        for move in way.route.moves:
            if move.source >= 0 and move.sender == where[move.source]:
                of(move.source, move.sender).sent_bytes += move.size_bytes(count)
    for way in {id(way): way for way in ways}.values() if costs.training else ():
        work = Work(way.rows)
        kept = kept_by_units(costs, way.route, way.device_of, work.is_cut, pieces)
        for run, held in zip(way.route.runs, in_flight(way.route, execution, len(way.rows)), strict=True):
            for unit in range(run.first, run.stop):
                of(unit, run.device).kept_bytes += work.bytes_of(kept[unit], held)
    return tuple(
        StageForecast(
            stage=index,
            device=name,
            forward_s=one.forward_s,
            backward_s=one.backward_s,
            kept_bytes=math.ceil(one.kept_bytes),
            sent_bytes=math.ceil(one.sent_bytes),
        )
        for (index, name), one in found.items()
    )
