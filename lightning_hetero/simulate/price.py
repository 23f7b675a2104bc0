"""Seconds of the stages of a route for one number of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_hetero.simulate.cost import StageCost
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.rerun import Piece
from lightning_hetero.simulate.route import Route


class StagePrice(NamedTuple):
    """What one stage takes for one micro-batch. Transfers occupy its device: the runtime has no side streams.

    Attributes:
        device: Index of its device.
        forward_in_s: Fetching its inputs.
        forward_s: Computing.
        forward_out_s: Sending its outputs to the root.
        backward_in_s: Fetching the gradients of its outputs.
        backward_s: Computing.
        backward_out_s: Sending the gradients of its inputs.
    """

    device: int
    forward_in_s: float
    forward_s: float
    forward_out_s: float
    backward_in_s: float
    backward_s: float
    backward_out_s: float


class Price(NamedTuple):
    """All stages for one micro-batch, and what the links carry for it.

    Attributes:
        stages: From the first to the last.
        link_s: Seconds by indices of sender and receiver, backward included.
        own_forward_s: Of the model's own code, on the root.
        own_backward_s: Likewise.
    """

    stages: tuple[StagePrice, ...]
    link_s: dict[tuple[int, int], float]
    own_forward_s: float
    own_backward_s: float


def price(
    costs: Costs, route: Route, rows: int, overhead_s: float, sums: float = 0.0, pieces: Sequence[Piece] = ()
) -> Price:
    """Price a route.

    Args:
        costs: Of the model.
        route: The stages.
        rows: Rows of the micro-batch.
        overhead_s: What the runtime adds to each call, forward and backward together.
        sums: How often its gradients are added to those of others: for all micro-batches but the first, once.
        pieces: What runs again in the backward.

    Raises:
        ProfileError: The profile knows no seconds of a unit on its device.
    """
    seconds = costs.seconds(rows)
    count = len(route.runs)
    forward_in, forward_out, backward_in, backward_out = ([0.0] * count for _ in range(4))
    link_s: dict[tuple[int, int], float] = {}
    for sender, receiver, size, times, comes_back, stage, enters, _, _ in route.moves:
        size_bytes = size.fixed + size.per_row * rows
        for a, b, there, back in (
            (sender, receiver, forward_in, forward_out),
            (receiver, sender, backward_out, backward_in),
        ):
            if there is backward_out and not comes_back:
                continue
            latency_s, s_per_byte = costs.paths[a][b]
            move_s = latency_s * times + size_bytes * s_per_byte
            (there if enters else back)[stage] += move_s
            link_s[a, b] = link_s.get((a, b), 0.0) + move_s
    halves = 2 if costs.training else 1
    stages = []
    for index, (device, first, stop, calls) in enumerate(route.runs):
        forward_s = math.fsum(seconds.forward_s[device][first:stop])
        backward_s = math.fsum(seconds.backward_s[device][first:stop])
        if math.isnan(forward_s + backward_s):
            both = zip(seconds.forward_s[device], seconds.backward_s[device], strict=True)
            lost = [math.isnan(f + b) for f, b in both]
            raise costs.missing(lost.index(True, first), device)
        if pieces:
            again = (seconds.forward_s[device][a:b] for a, b in pieces if first <= a < stop)
            backward_s += math.fsum(math.fsum(piece) for piece in again)
        added_s = overhead_s * calls / halves
        sums_s = sums * costs.gradient_sum_s(device, sum(costs.trained_bytes[first:stop])) if sums else 0.0
        stages.append(
            StagePrice(
                device,
                forward_in[index],
                forward_s + added_s,
                forward_out[index],
                backward_in[index],
                backward_s + added_s + sums_s if costs.training else 0.0,
                backward_out[index],
            )
        )
    return Price(tuple(stages), link_s, seconds.own_forward_s, seconds.own_backward_s)


def stage_costs(costs: Costs, price: Price) -> tuple[StageCost, ...]:
    """The same as a chain in which only neighbours exchange anything.

    What leaves a stage and what enters the next one become one transfer between the two. What the first one fetches
    from the root, and what the last one sends there, belongs to the stage itself.
    """
    stages = price.stages
    last = len(stages) - 1
    found = []
    for index, stage in enumerate(stages):
        before, after = stages[max(index - 1, 0)], stages[min(index + 1, last)]
        found.append(
            StageCost(
                device=costs.devices[stage.device],
                forward_s=stage.forward_s
                + (0.0 if index else stage.forward_in_s)
                + (0.0 if index < last else stage.forward_out_s),
                backward_s=stage.backward_s
                + (0.0 if index < last else stage.backward_in_s)
                + (0.0 if index else stage.backward_out_s),
                send_forward_s=stage.forward_out_s + after.forward_in_s if index < last else 0.0,
                send_backward_s=stage.backward_out_s + before.backward_in_s if index else 0.0,
            )
        )
    return tuple(found)
