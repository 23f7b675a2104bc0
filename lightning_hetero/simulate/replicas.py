"""What replicas add to a prediction: stages on several devices that share the rows of a batch.

Every micro-batch has its own way through the devices: where a stage has replicas, it goes to the one to which it is
dealt. Besides, copies of the parameters go out once a step, and sums of gradients come home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_hetero.plan.forecast import Execution
from lightning_hetero.plan.plan import Share
from lightning_hetero.schedule import TRANSFER
from lightning_hetero.schedule.rows import deal
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.peak import peak_bytes, resident_bytes
from lightning_hetero.simulate.rerun import Piece
from lightning_hetero.simulate.route import Route, route
from lightning_hetero.simulate.run import Slot

SharesOf = Mapping[str, tuple[Share, ...]]
"""The replicas of units that have some, the owner first."""


class Way(NamedTuple):
    """How some micro-batches go through the devices.

    Attributes:
        device_of: Device of each unit.
        route: The stages.
        rows: Rows of these micro-batches.
    """

    device_of: Mapping[str, str]
    route: Route
    rows: list[int]


def ways_of(
    costs: Costs, device_of: Mapping[str, str], owners: Route, shares_of: SharesOf, rows: Sequence[int]
) -> list[Way]:
    """The way of each micro-batch; the same object for those that go the same way.

    Args:
        costs: Of the model.
        device_of: Device of every unit; of replicated ones, that of the owner.
        owners: The route over these devices.
        shares_of: The replicas.
        rows: Rows of each micro-batch.

    Raises:
        PlacementError: A unit has no device, or one that is not in the inventory.
    """
    if not shares_of:
        return [Way(device_of, owners, [*rows])] * len(rows)
    dealt = {shares: deal(rows, [share.share for share in shares]) for shares in dict.fromkeys(shares_of.values())}
    known: dict[tuple[int, ...], Way] = {}
    lanes = []
    for lane, count in enumerate(rows):
        key = tuple(places[lane] for places in dealt.values())
        if key not in known:
            here = {unit: shares[dealt[shares][lane]].device for unit, shares in shares_of.items()}
            places = {**device_of, **here}
            known[key] = Way(places, route(costs, places), [])
        known[key].rows.append(count)
        lanes.append(known[key])
    return lanes


def add_exchange(
    costs: Costs, device_of: Mapping[str, str], shares_of: SharesOf, slots: list[Slot], end_s: float
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


def peak_of_ways(
    costs: Costs,
    device_of: Mapping[str, str],
    shares_of: SharesOf,
    execution: Execution,
    ways: Sequence[Way],
    pieces: Sequence[Piece] = (),
) -> dict[int, int]:
    """Peak memory by index of the device: what stays, once, and what comes on top on all ways together."""
    stays = resident_bytes(costs, device_of)
    for unit, shares in shares_of.items():
        copied = costs.copied_bytes(unit)
        for share in shares[1:]:
            stays[costs.devices.index(share.device)] += copied
    total = dict(enumerate(stays))
    used = {costs.root}
    for way in {id(way): way for way in ways}.values():
        without = resident_bytes(costs, way.device_of)
        for device, size_bytes in peak_bytes(costs, way.route, way.device_of, execution, way.rows, pieces).items():
            total[device] += size_bytes - without[device]
            used.add(device)
    return {device: round(total[device]) for device in sorted(used)}
