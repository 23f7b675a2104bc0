"""Small changes to a placement that make its prediction better: solvers know less than the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, permutations

from lightning_hetero.placement.judge import Homes, Judge, Priced
from lightning_hetero.plan.forecast import Execution

RUNS = (1, 2, 3, 5)
"""How many pieces in a row are moved at once."""


def improve(judge: Judge, start: Priced, *, tries: int, enough: Callable[[Priced], bool] | None = None) -> Priced:
    """Change one thing at a time as long as that helps: first what does not fit, then the objective.

    Args:
        judge: Prices placements.
        start: Where to begin.
        tries: How many new placements may be simulated.
        enough: Asked of each better placement; True ends the search.
    """
    best, last = start, judge.asked + tries
    better = True
    while better and not (enough is not None and enough(best)):
        better = False
        for homes, execution in _neighbours(judge, best):
            if judge.asked >= last or judge.time_is_up():
                return best
            priced = judge.price(homes, execution)
            if priced.key < best.key:
                best, better = priced, True
                break
    return best


def repair(judge: Judge, start: Priced, *, tries: int = 200) -> Priced:
    """Change a placement until it fits, and no further."""
    return improve(judge, start, tries=tries, enough=lambda priced: priced.fits)


def _neighbours(judge: Judge, best: Priced) -> Iterator[tuple[Homes, Execution]]:
    """Placements that differ in one thing, those first that help most often."""
    homes = best.homes
    ways = (best.execution,) if len(best.devices) > 1 else judge.executions  # one device says nothing about several
    for changed in _borders(homes):
        if judge.may_stand(changed):
            for execution in ways:
                yield changed, execution
    for execution in judge.ways(homes):
        if execution != best.execution:
            yield homes, execution
    for changed in (*exchanged(homes, judge.names), *_moved(judge, homes)):
        if judge.may_stand(changed):
            for execution in ways:
                yield changed, execution


def _borders(homes: Homes) -> Iterator[Homes]:
    """Move one border by one piece."""
    for spot, (one, other) in enumerate(pairwise(homes)):
        if one != other:
            yield (*homes[: spot + 1], one, *homes[spot + 2 :])
            yield (*homes[:spot], other, *homes[spot + 1 :])


def exchanged(homes: Homes, names: tuple[str, ...]) -> Iterator[Homes]:
    """Let one device do the work of another, which rests or takes over what the first one did."""
    used = [name for name in names if name in homes]
    for one, other in permutations(names, 2):
        if one in used:
            yield tuple(other if home == one else home for home in homes)
    for one, other in permutations(used, 2):
        if one < other:
            yield tuple({one: other, other: one}.get(home, home) for home in homes)


def _moved(judge: Judge, homes: Homes) -> Iterator[Homes]:
    """Move one piece to any device, or two or more in a row: single ones often pay a border before they gain."""
    for length in RUNS:
        for first in range(len(homes) - length + 1):
            run = homes[first : first + length]
            for name in judge.names:
                if any(home != name for home in run):
                    yield (*homes[:first], *(name,) * length, *homes[first + length :])
