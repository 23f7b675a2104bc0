"""Runs priced micro-batches in thought: whole, through lanes as "forward" does, or by a schedule of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_hetero.plan.forecast import Execution
from lightning_hetero.schedule import TRANSFER, Op, get_schedule
from lightning_hetero.simulate.cost import StageCost
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.lanes import Task, run_lanes
from lightning_hetero.simulate.price import Price, stage_costs
from lightning_hetero.simulate.step import Slot as Slot
from lightning_hetero.simulate.step import simulate_slots

OWN = "own"
"""The op of the model's own code, and of the loss."""
OPTIMIZER = "optimizer"
"""The op of the optimizer's step."""


def run_step(costs: Costs, prices: Sequence[Price], execution: Execution, used: int) -> tuple[list[Slot], float]:
    """The schedules "whole" and "forward": all forwards, own code once on the whole batch, all backwards.

    A micro-batch alone is "whole". There are as many lanes at once as devices in use, and one more. With
    rematerialization, a lane of the backward runs its forward again.

    Returns:
        What happens when, and when it is over.
    """
    slots: list[Slot] = []
    now_s = _lanes(costs, slots, [list(_forward(price)) for price in prices], 0.0, used + 1)
    own = costs.seconds(costs.profile.rows)
    for seconds in (own.own_forward_s, own.own_backward_s):
        if seconds:
            slots.append(Slot(costs.devices[costs.root], OWN, now_s, seconds, None, None))
            now_s += seconds
    if not costs.training:
        return slots, now_s
    again = execution.rematerialize
    lanes = [[*(_forward(price) if again else ()), *_backward(price)] for price in prices]
    return slots, _lanes(costs, slots, lanes, now_s, used + 1)


def run_steps_schedule(costs: Costs, prices: Sequence[Price], execution: Execution) -> tuple[list[Slot], float]:
    """The schedules of `micro_batching="step"`: own code runs for each micro-batch, after the last stage.

    Returns:
        What happens when, and when it is over.

    Raises:
        ScheduleError: There is no schedule of that name.
    """
    schedule = get_schedule(execution.schedule)
    chains = {id(price): _with_own_code(costs, price) for price in prices}
    ops: tuple[Op, ...] | None = None if costs.training else ("F",)
    slots = simulate_slots(
        chains[id(prices[0])],
        schedule,
        len(prices),
        ops=ops,
        overlap=False,
        costs_of=lambda micro_batch: chains[id(prices[micro_batch])],
    )
    return slots, max(slot.start_s + slot.duration_s for slot in slots)


def _forward(price: Price) -> Iterator[Task]:
    for index, stage in enumerate(price.stages):
        yield Task(stage.device, "F", index, stage.forward_in_s, stage.forward_s, stage.forward_out_s)


def _backward(price: Price) -> Iterator[Task]:
    for index, stage in reversed([*enumerate(price.stages)]):
        yield Task(stage.device, "B", index, stage.backward_in_s, stage.backward_s, stage.backward_out_s)


def _lanes(costs: Costs, slots: list[Slot], lanes: Sequence[Sequence[Task]], begin_s: float, in_flight: int) -> float:
    """Run lanes and note what they do; when the last one is through."""
    starts, end_s = run_lanes(lanes, begin_s, in_flight)
    names = costs.devices
    for at_s, lane, (device, op, stage, in_s, work_s, out_s) in starts:
        name = names[device]
        if in_s:
            slots.append(Slot(name, TRANSFER, at_s, in_s, stage, lane))
        slots.append(Slot(name, op, at_s + in_s, work_s, stage, lane))
        if out_s:
            slots.append(Slot(name, TRANSFER, at_s + in_s + work_s, out_s, stage, lane))
    return end_s


def _with_own_code(costs: Costs, price: Price) -> tuple[StageCost, ...]:
    """The stages, and own code: in the last one if that is on the root, else as one more."""
    stages = stage_costs(costs, price)
    root = costs.devices[costs.root]
    forward_s, backward_s = price.own_forward_s, price.own_backward_s
    if not forward_s and not backward_s:
        return stages
    last = stages[-1]
    if last.device != root:
        return (*stages, StageCost(device=root, forward_s=forward_s, backward_s=backward_s))
    merged = StageCost(
        device=root,
        forward_s=last.forward_s + forward_s,
        backward_s=last.backward_s + backward_s,
        send_backward_s=last.send_backward_s,
    )
    return (*stages[:-1], merged)
