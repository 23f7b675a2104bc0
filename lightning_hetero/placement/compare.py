"""Asks every policy for its best placement, and finds those that are worth a few real steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

from lightning_hetero.placement import dag, exact, heft, hybrid, interleaved, proportional, replicate
from lightning_hetero.placement.even import EvenPolicy
from lightning_hetero.placement.found import Found, best_of
from lightning_hetero.placement.improve import improve
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.memory_first import fill
from lightning_hetero.plan.forecast import WHOLE

LEADERS, TRIES = 3, 60
HOPELESS = 1.5
"""A placement that is predicted to take so many times as long as the best one is not worth real steps."""
ELSEWHERE = 0.25
"""Part of the pieces that have to stand on other devices to make another placement of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What all policies found.

    Attributes:
        singles: The whole model on each device that may hold it.
        asked: What every policy found.
        winner: Name of the policy from whose answer the best one comes.
        best: The best placement; it may not fit, and it may be one of `singles`.
    """

    singles: dict[str, Priced]
    asked: dict[str, Found]
    winner: str
    best: Priced

    @property
    def home(self) -> Priced | None:
        """The best single device; None if constraints forbid any."""
        return best_of(self.singles.values()) if self.singles else None


def compare(judge: Judge) -> Compared:
    """Ask every policy, and improve the best answers. There has to be a piece."""
    singles = judge.singles()
    asked = dict(_searches(judge))
    # A good plan of one kind may have a better neighbour than the best plan of another kind has.
    leaders = sorted(asked, key=lambda name: asked[name].best.key)[:LEADERS]
    improved = {
        name: found if (found := asked[name].best).shares else improve(judge, found, tries=TRIES) for name in leaders
    }
    winner = min(improved, key=lambda name: improved[name].key)
    return Compared(singles=singles, asked=asked, winner=winner, best=improved[winner])


def is_hopeful(priced: Priced, best: Priced) -> bool:
    """Whether real steps may show that it is the better one of the two after all."""
    return priced.fits and priced.value <= HOPELESS * best.value


def truly_different(judge: Judge, best: Priced, count: int) -> list[Priced]:
    """The best placements that were priced, of which no two are nearly the same, `best` being the first."""
    chosen = [best]
    for priced in sorted(judge.priced(), key=lambda priced: priced.key):
        if len(chosen) == count or not is_hopeful(priced, best):
            break
        if all(_differ(priced, other) for other in chosen):
            chosen.append(priced)
    return chosen


def _searches(judge: Judge) -> Iterator[tuple[str, Found]]:
    """What each policy finds, the quick ones first, in case time runs out. The first three always answer."""
    pieces = judge.pieces
    yield "even", Found(best=judge.best_execution(EvenPolicy().homes(judge.problem, pieces)))
    yield "memory_first", Found(best=judge.best_execution(fill(judge.problem, pieces)[0]))
    yield "proportional", proportional.find(judge)
    if len(judge.names) > 1 and not judge.time_is_up():
        yield "replicate", replicate.find(judge)
    if min(len(judge.names), len(pieces)) < 2:
        return
    searches = {
        "interleaved": interleaved.find,
        "heft": heft.find,
        "exact": exact.find,
        "hybrid": hybrid.find,
        "dag": dag.find,
    }
    for name, find in searches.items():
        if judge.time_is_up():
            return
        yield name, find(judge)


def _differ(one: Priced, other: Priced) -> bool:
    """By devices, by whether and how finely the batch is cut, or by where a good part of the model stands."""
    first, second = one.execution, other.execution
    if (one.devices, one.shares) != (other.devices, other.shares):
        return True
    if (first.schedule == WHOLE) != (second.schedule == WHOLE):
        return True
    if abs(log2(first.micro_batches / second.micro_batches)) >= 2:
        return True
    moved = sum(here != there for here, there in zip(one.homes, other.homes, strict=True))
    return moved > ELSEWHERE * len(one.homes)
