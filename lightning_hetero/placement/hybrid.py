"""The policy `hybrid`: a pipeline of which stages stand on several devices, which share their micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise

from lightning_hetero.placement.found import Found, best_of, place_by
from lightning_hetero.placement.judge import Judge, Priced, Shares
from lightning_hetero.placement.piece_costs import PieceCosts
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.replicas import can_share, replicated_execution
from lightning_hetero.plan.forecast import Execution
from lightning_hetero.plan.plan import Share

MOST_CUTS, MOST_DEVICES, LEADERS = 24, 6, 12

_Group = tuple[str, ...]


@register_policy("hybrid")
@dataclass(frozen=True)
class HybridPolicy:
    """Cut a chain of units into two or three stages, each for one device or for several that share its micro-batches.

    Devices are grouped by speed, the fastest first or last. Borders are looked for by the work of a stage and the
    speeds of its group added up; the best by that are simulated, with several numbers of micro-batches. It needs three
    devices that may hold all units; with fewer, the best single one is taken. After Park et al., "HetPipe: enabling
    large DNN training on (whimpy) heterogeneous GPU clusters", 2020, and Narayanan et al., "PipeDream: generalized
    pipeline parallelism for DNN training", 2019.
    """

    name: str = "hybrid"

    def place(self, problem: Problem) -> Placement:
        """Group devices, and cut."""
        return place_by(find, problem, self.name, "Stages of a pipeline stand on one device or on several.")


def find(judge: Judge) -> Found:
    """The best pipeline with at least one stage on several devices, or the best single device if that is better."""
    candidates = list(judge.singles().values()) or [
        judge.best_execution([piece.devices[0] for piece in judge.pieces]),
    ]
    names = [name for name in judge.names if all(name in piece.devices for piece in judge.pieces)][:MOST_DEVICES]
    if len(names) > 2 and len(judge.pieces) > 1 and can_share(judge.problem, 2) and judge.profile.rows > 1:
        candidates += _pipelines(judge, names)
    return Found(best=best_of(candidates))


def _pipelines(judge: Judge, names: Sequence[str]) -> Iterator[Priced]:
    """The pipelines that look best, priced."""
    costs = PieceCosts.of(judge, judge.executions[0])
    work = {name: [f + b for f, b in zip(costs.forward_s[name], costs.backward_s[name], strict=True)] for name in names}
    by_speed = sorted(names, key=lambda name: sum(work[name]))
    until = {name: list(accumulate(seconds, initial=0.0)) for name, seconds in work.items()}
    looked = []
    for order in (by_speed, by_speed[::-1]):
        for groups in _groupings(order):
            for borders in _borders(len(judge.pieces), len(groups)):
                looked.append((_slowest_s(until, groups, borders), groups, borders))
            if judge.time_is_up():
                break
    for _, groups, borders in sorted(looked, key=lambda one: one[0])[:LEADERS]:
        homes, shares = _spread(until, groups, borders)
        for execution in _executions(judge, shares):
            if judge.time_is_up():
                return
            yield judge.price_shared(homes, shares, execution)


def _groupings(order: Sequence[str]) -> Iterator[tuple[_Group, ...]]:
    """Two or three neighbouring groups of some of the devices, at least one with several."""
    for used in range(3, len(order) + 1):
        for stages in (2, 3):
            for ends in combinations(range(1, used), stages - 1):
                edges = (0, *ends, used)
                groups = tuple(tuple(order[a:b]) for a, b in pairwise(edges))
                if any(len(group) > 1 for group in groups):
                    yield groups


def _borders(pieces: int, stages: int) -> Iterator[tuple[int, ...]]:
    """First pieces of the stages, and the number of pieces; of large models not every border."""
    step = max(1, pieces // MOST_CUTS)
    for inner in combinations(range(step, pieces, step), stages - 1):
        yield (0, *inner, pieces)


def _speeds(until: dict[str, list[float]], group: _Group, first: int, stop: int) -> dict[str, float]:
    """How often a second each device of a group could do the work of a stage."""
    return {name: 1 / max(until[name][stop] - until[name][first], 1e-12) for name in group}


def _slowest_s(until: dict[str, list[float]], groups: Sequence[_Group], borders: Sequence[int]) -> float:
    """Seconds of the slowest stage if each group works as fast as its devices together.

    Args:
        until: Seconds of all pieces before each piece, by device.
        groups: The devices of each stage.
        borders: The first piece of each stage, and the number of pieces.
    """
    stages = zip(groups, borders[:-1], borders[1:], strict=True)
    return max(1 / sum(_speeds(until, group, first, stop).values()) for group, first, stop in stages)


def _spread(
    until: dict[str, list[float]], groups: Sequence[_Group], borders: Sequence[int]
) -> tuple[list[str], Shares]:
    """Home and replicas of every piece: shares by speed."""
    homes: list[str] = []
    shares: list[tuple[Share, ...]] = []
    for group, first, stop in zip(groups, borders[:-1], borders[1:], strict=True):
        speed = _speeds(until, group, first, stop)
        fastest = sorted(group, key=lambda name: -speed[name])
        top = speed[fastest[0]]
        of_stage = tuple(Share(device=name, share=round(speed[name] / top, 4)) for name in fastest)
        homes += [fastest[0]] * (stop - first)
        shares += [of_stage if len(of_stage) > 1 else ()] * (stop - first)
    return homes, tuple(shares)


def _executions(judge: Judge, shares: Shares) -> Iterator[Execution]:
    """Numbers of micro-batches: what is asked for, or some from that of the replicas on."""
    most = max(len(of_piece) for of_piece in shares)
    shares_of = {piece.name: of for piece, of in zip(judge.pieces, shares, strict=True) if of}
    if judge.problem.micro_batches is not None:
        if can_share(judge.problem, most):
            yield replicated_execution(judge.problem, shares_of)
        return
    for count in (4, 8, 16, 32):
        if most <= count <= judge.profile.rows:
            yield replicated_execution(replace(judge.problem, micro_batches=count), shares_of)
