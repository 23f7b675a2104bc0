"""The policy `replicate`: the whole model on several devices, each with as many rows as it is fast enough for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.found import Found, best_of, place_by
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.replicas import can_share, replicated_execution
from lightning_hetero.placement.solve.shares import ShareDevice, solve_shares
from lightning_hetero.plan.plan import Share
from lightning_hetero.simulate.price import price
from lightning_hetero.simulate.route import route

MOST_SIZES = 512
"""Numbers of rows that are looked at; larger batches are dealt out in blocks."""
MOST_DEVICES = 5
"""Of so many devices all sets are looked at; of more, the fastest one, two, three and so on."""
_LESS = 1 / 16  # of its rows that a device gives away which turned out overfull
_TRIES = 24


@register_policy("replicate")
@dataclass(frozen=True)
class ReplicatePolicy:
    """Put the whole model on the fastest devices, and give each the rows that it gets done as soon as the others.

    Shares are exact for the measured seconds as a function of rows (see `solve_shares`). Those devices take part, and
    that one of them owns the parameters, with which the prediction of the whole step is best, copies of parameters and
    gradients included. Where nothing can be shared (one device, or no schedule that cuts batches), all stands on the
    best single device.
    """

    name: str = "replicate"

    def place(self, problem: Problem) -> Placement:
        """Deal the rows out."""
        return place_by(find, problem, self.name, "The rows of a batch are shared by replicas of the whole model.")


def find(judge: Judge) -> Found:
    """The best shares of the fastest one, two, three ... devices."""
    singles = judge.singles()
    if not singles:  # constraints forbid any device to hold all of the model
        return Found(best=judge.best_execution([piece.devices[0] for piece in judge.pieces]))
    candidates = list(singles.values())
    if judge.profile.rows > 1 and judge.costs.units:
        by_speed = sorted(singles, key=lambda name: singles[name].value)
        for names in _sets(by_speed):
            if judge.time_is_up():
                break
            if can_share(judge.problem, len(names)):
                candidates += _shared(judge, names)
    return Found(best=best_of(candidates))


def _sets(by_speed: Sequence[str]) -> Iterator[Sequence[str]]:
    """The sets of devices to look at, those of the fastest ones first."""
    for count in range(2, len(by_speed) + 1):
        yield from combinations(by_speed, count) if len(by_speed) <= MOST_DEVICES else (by_speed[:count],)


def _shared(judge: Judge, names: Sequence[str]) -> Iterator[Priced]:
    """The model on all of these devices, with rows that fit; nothing if that leaves a device idle."""
    rows = judge.profile.rows
    block = -(-rows // MOST_SIZES)
    blocks = -(-rows // block)
    seconds = {name: _seconds(judge, name, block, blocks) for name in names}
    most = dict.fromkeys(names, blocks)
    for _ in range(_TRIES):
        tables = [ShareDevice(name=name, seconds=seconds[name], most_rows=most[name]) for name in names]
        try:
            answer = solve_shares(tables, blocks)
        except InfeasiblePlanError:
            return
        shares = [Share(device=share.device, share=float(share.rows)) for share in answer.shares if share.rows]
        if len(shares) == 1 and not judge.price_alone(shares[0].device).fits:
            most[shares[0].device] = blocks - 1  # the others have to take some
            continue
        if len(shares) < len(names):
            return  # fewer devices are another set
        priced = _priced(judge, shares)
        over = [d for d in priced.forecast.devices if d.memory_bytes > d.limit_bytes and d.device in most]
        if not over:
            yield priced
            return
        for device in over:
            got = next(share.share for share in shares if share.device == device.device)
            most[device.device] = int(got - max(1.0, got * _LESS))
            if most[device.device] < 1:
                return


def _priced(judge: Judge, shares: Sequence[Share]) -> Priced:
    """The price of these shares with the best owner."""
    return best_of(_owned(judge, (owner, *(s for s in shares if s is not owner))) for owner in shares)


def _owned(judge: Judge, shares: tuple[Share, ...]) -> Priced:
    """The price if the first device owns the parameters."""
    execution = replicated_execution(judge.problem, dict.fromkeys(judge.problem.graph.names, shares))
    return judge.price_shared([shares[0].device] * len(judge.pieces), (shares,) * len(judge.pieces), execution)


def _seconds(judge: Judge, name: str, block: int, blocks: int) -> dict[int, float]:
    """Seconds of a step on one device, transfers included, by the number of blocks of rows."""
    costs = judge.costs
    way = route(costs, dict.fromkeys(costs.graph.names, name))
    found = {}
    for count in range(1, blocks + 1):
        stages = price(costs, way, count * block, costs.profile.call_overhead_s).stages
        found[count] = sum(sum(stage[1:]) for stage in stages)
    return found
