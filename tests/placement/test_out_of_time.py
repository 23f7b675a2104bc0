"""Searches that are stopped: they answer soon, with the best so far, and say so. No clock: questions are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest

from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.placement.judge import Judge
from lightning_hetero.plan import Plan

Measured = Callable[..., Problem]
LONG = ["auto", "measured", "exact", "dag", "interleaved"]
NOTE = "The search was stopped after 10 s; there may be better plans."


class Allows:
    """Says that time is up once it was asked so often."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.times


@dataclass(frozen=True)
class Search:
    """What came of a search.

    Attributes:
        plan: The best plan.
        simulated: How many plans were simulated for it.
    """

    plan: Plan
    simulated: int


Searched = Callable[[str, float], Search]


@pytest.fixture(scope="module")
def searched(measured: Measured) -> Searched:
    """`searched(policy, times)` searches until it has asked so often whether time is up; each search is made once."""
    price = Judge._price

    @cache
    def search(name: str, times: float) -> Search:
        simulated = 0

        def counting(self: Judge, *args: object) -> object:
            nonlocal simulated
            simulated += 1
            return price(self, *args)  # type: ignore[arg-type]

        problem = measured([0.01 + 0.001 * (i % 7) for i in range(24)], [1.0, 2.0, 3.0, 1.5], rows=32, overhead_s=1e-4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Judge, "_price", counting)
            plan = make_plan(get_policy(name), replace(problem, out_of_time=Allows(times)))
        return Search(plan, simulated)

    return search


@pytest.mark.parametrize("name", LONG)
def test_the_plan_says_that_the_search_was_stopped(name: str, searched: Searched) -> None:
    assert NOTE in searched(name, 0).plan.notes
    assert NOTE not in searched(name, math.inf).plan.notes


@pytest.mark.parametrize("name", LONG)
def test_little_is_simulated_once_time_is_up(name: str, searched: Searched) -> None:
    hasty, patient = searched(name, 0).simulated, searched(name, math.inf).simulated
    assert hasty <= 60  # a few placements, each with all numbers of micro-batches
    assert patient > 2 * hasty


@pytest.mark.parametrize("name", LONG)
def test_more_time_never_makes_a_plan_worse(name: str, searched: Searched) -> None:
    found = []
    for times in (0, 20, 100, math.inf):
        plan = searched(name, times).plan
        assert plan.forecast is not None
        found.append(plan.forecast.step_s)
    assert found[-1] == min(found)
