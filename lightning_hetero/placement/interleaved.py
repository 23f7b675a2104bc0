"""The policy `interleaved`: several stages for each device, for a shorter warm-up and drain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.as_chain import as_chain, device_of_turn, homes_of
from lightning_hetero.placement.even import nearest
from lightning_hetero.placement.executions import sparse
from lightning_hetero.placement.found import Found, best_of, place_by
from lightning_hetero.placement.improve import improve
from lightning_hetero.placement.judge import Homes, Judge
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.solve import ChainProblem, least_bottleneck_in_order
from lightning_hetero.plan.forecast import FORWARD, Execution

TURNS, TRIES = (2, 3, 4), 100
SCHEDULE = "interleaved_1f1b"
ALL_ORDERS = 3  # devices; more of them are tried by speed and as listed


@register_policy("interleaved")
@dataclass(frozen=True)
class InterleavedPolicy:
    """Deal units out in several rounds: each device owns a stage of every round.

    Stages are cut by the exact programme for a given order of devices, for several orders and numbers of rounds. They
    run by the schedule "interleaved_1f1b" if that is allowed, and else by "forward".

    References:
        Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters, SC 2021.

    Args:
        turns: Numbers of stages for each device to try.
        tries: How many changed placements may be simulated in the end.
    """

    turns: tuple[int, ...] = TURNS
    tries: int = TRIES
    name: str = "interleaved"

    def place(self, problem: Problem) -> Placement:
        """Deal out and choose."""
        if not all(turn >= 2 for turn in self.turns) or not self.turns:
            raise PlacementError(f"interleaved needs at least 2 stages for each device, got turns={self.turns}")
        search = partial(find, turns=self.turns, tries=self.tries)
        return place_by(search, problem, self.name, "Every device in use owns several stages, where that is possible.")


def find(judge: Judge, *, turns: tuple[int, ...] = TURNS, tries: int = TRIES) -> Found:
    """The best deal."""
    schedules = {execution.schedule for execution in judge.executions}
    wanted = next((name for name in (SCHEDULE, FORWARD) if name in schedules), None)
    allowed = tuple(e for e in judge.executions if wanted is None or e.schedule == wanted)
    dealt = _dealt(judge)
    start = best_of(judge.price(dealt, execution) for execution in allowed)
    for homes in _cut(judge, allowed, turns):  # not all of them first: time may run out
        if judge.time_is_up():
            break
        start = best_of((start, *(judge.price(homes, execution) for execution in allowed)))
    return Found(best=improve(judge, start, tries=tries), proof="exact cuts for the orders and rounds that were tried")


def _dealt(judge: Judge) -> Homes:
    """Two rounds of equal runs."""
    count = min(2 * len(judge.names), len(judge.pieces))
    runs = [spot * count // len(judge.pieces) for spot in range(len(judge.pieces))]
    return nearest(judge.pieces, judge.names, [run % len(judge.names) for run in runs])


def _cut(judge: Judge, executions: tuple[Execution, ...], turns: tuple[int, ...]) -> Iterator[Homes]:
    for execution in sparse(executions):
        for turn in turns:
            if 2 * turn > len(judge.pieces):
                continue
            chain = as_chain(judge, execution, turn)
            for order in _orders(judge, chain):
                if judge.time_is_up():
                    return
                if turn * len(order) <= len(judge.pieces):
                    names = [f"{name}#{lap}" for lap in range(turn) for name in order]
                    answer = least_bottleneck_in_order(chain, names)
                    if answer is not None:
                        yield homes_of(answer.plan, turn)


def _orders(judge: Judge, chain: ChainProblem) -> list[tuple[str, ...]]:
    """Orders of at least two devices."""
    names = judge.names
    if len(names) <= ALL_ORDERS:
        return [order for count in range(2, len(names) + 1) for order in permutations(names, count)]
    kind = {device_of_turn(device.name, 2): device.kind for device in chain.devices}
    fast = sorted(names, key=lambda name: sum(chain.forward_s[kind[name]]) + sum(chain.backward_s[kind[name]]))
    listed = [
        order
        for count in range(2, len(names) + 1)
        for order in (tuple(fast[:count]), tuple(name for name in names if name in fast[:count]))
    ]
    return list(dict.fromkeys(listed))
