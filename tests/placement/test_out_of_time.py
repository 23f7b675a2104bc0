"""Searches that are stopped: they answer soon, with the best so far, and say so. No clock: questions are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.placement.judge import Judge

Measured = Callable[..., Problem]
LONG = ["auto", "measured", "exact", "dag", "interleaved"]
NOTE = "The search was stopped after 10 s; there may be better plans."


def large(measured: Measured) -> Problem:
    return measured([0.01 + 0.001 * (i % 7) for i in range(24)], [1.0, 2.0, 3.0, 1.5], rows=32, overhead_s=1e-4)


class Allows:
    """Says that time is up once it was asked so often."""

    def __init__(self, times: float) -> None:
        self.times = times
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.times


@pytest.mark.parametrize("name", LONG)
def test_the_plan_says_that_the_search_was_stopped(name: str, measured: Measured) -> None:
    assert NOTE in make_plan(get_policy(name), replace(large(measured), out_of_time=Allows(0))).notes
    assert NOTE not in make_plan(get_policy(name), replace(large(measured), out_of_time=Allows(float("inf")))).notes


@pytest.mark.parametrize("name", LONG)
def test_little_is_simulated_once_time_is_up(name: str, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = 0
    price = Judge._price

    def counting(self: Judge, *args: object) -> object:
        nonlocal simulated
        simulated += 1
        return price(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "_price", counting)
    make_plan(get_policy(name), replace(large(measured), out_of_time=Allows(0)))
    hasty, simulated = simulated, 0
    make_plan(get_policy(name), large(measured))
    assert hasty <= 60  # a few placements, each with all numbers of micro-batches
    assert simulated > 2 * hasty


@pytest.mark.parametrize("name", LONG)
def test_more_time_never_makes_a_plan_worse(name: str, measured: Measured) -> None:
    found = []
    for times in (0, 20, 100, float("inf")):
        plan = make_plan(get_policy(name), replace(large(measured), out_of_time=Allows(times)))
        assert plan.forecast is not None
        found.append(plan.forecast.step_s)
    assert found[-1] == min(found)
