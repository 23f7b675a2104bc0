"""What each constraint costs: the best plan without it, against the one with all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.compare import compare
from lightning_hetero.placement.found import best_of
from lightning_hetero.placement.judge import Judge, Priced

_WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "pins": {"pins": {}},
    "together": {"together": ()},
    "forbidden": {"forbidden": ()},
    "trusted": {"trusted": None, "private": ()},
}


def constraint_costs(judge: Judge, best: Priced) -> Iterator[str]:
    """A sentence for each kind of rule that the problem has, while there is time.

    Args:
        judge: Of the problem with all its rules.
        best: The choice.
    """
    problem = judge.problem
    # The choice may be a single device, although more of them would save a little: no rule has to do with that.
    bound = min((priced.value for priced in judge.priced() if priced.fits), default=best.value)
    for name, without in _WITHOUT.items():
        if not getattr(problem.constraints, name):
            continue
        if judge.time_is_up():
            return
        try:
            free = Judge(replace(problem, constraints=replace(problem.constraints, **without)))
            found = compare(free)
        except PlacementError:  # the other rules make no sense without this one
            continue
        value = best_of(priced for priced in (found.best, found.home) if priced is not None).value
        if value < bound * (1 - 5e-4):
            share = 100 * (bound / value - 1) if value > 0 else float("inf")
            yield f"The rule {name!r} costs +{share:.3g} %: so much better is the best plan that was found without it."
        else:
            yield f"The rule {name!r} costs nothing: no better plan was found without it."
