"""Predicts plans in which stages stand on several devices that share the rows of a batch.

Every micro-batch has its own way through the devices: where a stage has replicas, it goes to the one to which it is
dealt. So this is `predict` with a route for each of them, and with what replicas cost besides: copies of the parameters
go out once a step, sums of gradients come home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_hetero.errors import ScheduleError
from lightning_hetero.plan.forecast import FORWARD, Execution
from lightning_hetero.plan.plan import Share
from lightning_hetero.schedule import TRANSFER
from lightning_hetero.schedule.rows import deal, split_rows
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.peak import peak_bytes, resident_bytes
from lightning_hetero.simulate.predict import Prediction, add_optimizer, as_prediction
from lightning_hetero.simulate.price import price
from lightning_hetero.simulate.route import Route, route
from lightning_hetero.simulate.run import Slot, run_step


class _Way(NamedTuple):
    """How some micro-batches go through the devices.

    Attributes:
        device_of: Device of each unit.
        route: The stages.
        rows: Rows of these micro-batches.
    """

    device_of: Mapping[str, str]
    route: Route
    rows: list[int]


def predict_replicas(
    costs: Costs, device_of: Mapping[str, str], shares_of: Mapping[str, tuple[Share, ...]], execution: Execution
) -> Prediction:
    """Predict one step of a placed model with replicas.

    Args:
        costs: Of the model on these devices.
        device_of: Device name of every unit of the graph; of replicated ones, that of the owner.
        shares_of: The replicas of units that have some, the owner first.
        execution: How a batch runs; of the schedules, "forward" only.

    Raises:
        PlacementError: A unit has no device, or one that is not in the inventory.
        ProfileError: The profile knows no seconds of a unit on its device.
        ScheduleError: The schedule is another one.
    """
    if execution.schedule != FORWARD:
        raise ScheduleError(
            f"plans with replicas are predicted for the schedule {FORWARD!r} only, and this one has "
            f"{execution.schedule!r}"
        )
    rows = split_rows(costs.profile.rows, execution.micro_batches, execution.weights)
    lanes, ways = _ways(costs, device_of, shares_of, rows)
    sums = 1 - 1 / len(rows)
    prices = [
        price(costs, way.route, count, costs.profile.call_overhead_s, sums)
        for way, count in zip(lanes, rows, strict=True)
    ]
    used = {device for way in ways for device in way.route.devices}
    slots, end_s = run_step(costs, prices, execution, len(used))
    end_s = _exchange(costs, device_of, shares_of, slots, end_s)
    end_s = add_optimizer(costs, route(costs, device_of), slots, end_s)
    return as_prediction(costs, prices, slots, end_s, _memory(costs, device_of, shares_of, execution, ways))


def _ways(
    costs: Costs, device_of: Mapping[str, str], shares_of: Mapping[str, tuple[Share, ...]], rows: Sequence[int]
) -> tuple[list[_Way], list[_Way]]:
    """The way of each micro-batch, and the different ones among them."""
    dealt = {shares: deal(rows, [share.share for share in shares]) for shares in set(shares_of.values())}
    known: dict[tuple[int, ...], _Way] = {}
    lanes = []
    for lane, count in enumerate(rows):
        key = tuple(places[lane] for places in dealt.values())
        if key not in known:
            here = {unit: shares[dealt[shares][lane]].device for unit, shares in shares_of.items()}
            places = {**device_of, **here}
            known[key] = _Way(places, route(costs, places), [])
        known[key].rows.append(count)
        lanes.append(known[key])
    return lanes, list(known.values())


def _exchange(
    costs: Costs,
    device_of: Mapping[str, str],
    shares_of: Mapping[str, tuple[Share, ...]],
    slots: list[Slot],
    end_s: float,
) -> float:
    """Add the copies of parameters that go out and the gradients that come home; when all is done.

    The thread of the model does both, before the first micro-batch begins and after the last one has ended. Both are
    counted at the end, as the prediction does not ask when.
    """
    if not costs.training:
        return end_s
    at = {name: index for index, name in enumerate(costs.devices)}
    now_s = end_s
    for unit, shares in shares_of.items():
        home, size_bytes = at[device_of[unit]], costs.graph[unit].trainable_bytes
        for share in shares[1:]:
            there = at[share.device]
            for sender, receiver in ((home, there), (there, home)):
                latency_s, s_per_byte = costs.paths[sender][receiver]
                seconds = latency_s + size_bytes * s_per_byte
                if sender == there:
                    seconds += costs.gradient_sum_s(home, size_bytes)
                slots.append(Slot(costs.devices[receiver], TRANSFER, now_s, seconds, None, None))
                now_s += seconds
    return now_s


def _memory(
    costs: Costs,
    device_of: Mapping[str, str],
    shares_of: Mapping[str, tuple[Share, ...]],
    execution: Execution,
    ways: Sequence[_Way],
) -> dict[int, int]:
    """Peak memory by index of the device: what stays, once, and what comes on top on all ways together."""
    stays = resident_bytes(costs, device_of)
    for unit, shares in shares_of.items():
        copied = costs.copied_bytes(unit)
        for share in shares[1:]:
            stays[costs.devices.index(share.device)] += copied
    total = dict.fromkeys(range(len(stays)), 0.0) | dict(enumerate(stays))
    used = {costs.root}
    for way in ways:
        without = resident_bytes(costs, way.device_of)
        for device, size_bytes in peak_bytes(costs, way.route, way.device_of, execution, way.rows).items():
            total[device] += size_bytes - without[device]
            used.add(device)
    return {device: int(total[device]) for device in sorted(used)}
