"""Who has a turn, when a trial ends, and who stays: with made-up seconds, so nothing here depends on a clock."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.graph import ModelGraph, Unit
from lightning_hetero.plan import Plan
from lightning_hetero.plan.build import build_plan
from lightning_hetero.plan.forecast import Execution
from lightning_hetero.strategy.trial import MOST_STEPS, TIE, TIMED, WARM_CUT, WARM_WHOLE, Trial
from lightning_hetero.testing.inventories import inventory_of

INVENTORY = inventory_of("dev:0", "dev:1", "cpu")
SIZES = {"parameters": 1, "parameter_bytes": 4, "trainable_bytes": 4, "buffer_bytes": 0}
UNITS = tuple(Unit(name=f"u{i}", kind="Linear", tied_to=f"u{i}", **SIZES) for i in range(4))


def plan_on(*devices: str, micro_batches: int = 1) -> Plan:
    """Four units on devices in turn."""
    execution = Execution(micro_batches=micro_batches, schedule="forward" if micro_batches > 1 else "whole")
    device_of = {unit.name: devices[spot * len(devices) // 4] for spot, unit in enumerate(UNITS)}
    return build_plan(ModelGraph(units=UNITS), INVENTORY, device_of, policy="test", execution=execution)


ONE, OTHER = plan_on("dev:0"), plan_on("dev:1")
BOTH = plan_on("dev:0", "dev:1", micro_batches=4)
ALL = plan_on("dev:0", "dev:1", "cpu", "cpu", micro_batches=4)


def run(trial: Trial, seconds: Callable[[Plan], float]) -> list[Plan]:
    """Run a trial to its end. What ran, step by step."""
    ran = []
    while not trial.is_over:
        ran.append(trial.plan)
        trial.took(seconds(trial.plan))
    return ran


def test_a_plan_that_is_faster_by_far_needs_one_turn() -> None:
    trial = Trial(ONE, [1.0, 1.1], [BOTH])
    assert run(trial, lambda _: 0.5) == [BOTH] * (WARM_CUT + TIMED)
    assert trial.winner.plan is BOTH


def test_a_plan_that_is_slower_by_far_needs_one_turn() -> None:
    trial = Trial(ONE, [1.0, 1.1], [BOTH])
    assert run(trial, lambda _: 5.0) == [BOTH] * (WARM_CUT + TIMED)
    assert trial.winner.plan is ONE


def test_plans_that_are_near_take_turns() -> None:
    trial = Trial(ONE, [1.0, 1.0], [BOTH])
    ran = run(trial, lambda plan: 1.0 if plan is ONE else 0.9)
    turns = [BOTH] * (WARM_CUT + TIMED) + [ONE] * (WARM_WHOLE + TIMED) + [BOTH] * (WARM_CUT + TIMED)
    assert ran == turns
    assert trial.winner.plan is BOTH


def test_the_first_steps_of_a_turn_do_not_count() -> None:
    trial = Trial(ONE, [1.0, 1.0], [OTHER])
    steps = iter([0.1] * WARM_WHOLE + [3.0] * TIMED)
    run(trial, lambda _: next(steps))
    assert trial.winner.plan is ONE


def test_a_disturbance_during_a_turn_decides_nothing() -> None:
    """The rival is faster; all of its first turn but one step is disturbed."""
    trial = Trial(ONE, [1.0, 1.0], [BOTH])
    disturbed = iter([2.0] * WARM_CUT + [1.3, 2.0])
    run(trial, lambda plan: 1.0 if plan is ONE else next(disturbed, 0.8))
    assert trial.winner.plan is BOTH


@pytest.mark.parametrize("rival", [BOTH, ALL])
def test_a_tie_goes_to_the_plan_with_fewer_devices(rival: Plan) -> None:
    trial = Trial(rival, [1.0, 1.0], [ONE])
    run(trial, lambda plan: 1.0 if plan is ONE else 1.0 - TIE / 2)
    assert trial.winner.plan is ONE


def test_a_plan_that_is_the_first_one_again_is_not_tried_but_knows_more() -> None:
    twin = plan_on("dev:0")
    trial = Trial(ONE, [1.0, 1.0], [twin])
    assert trial.is_over
    assert trial.plan is twin
    assert trial.verdict() == ""


def test_a_plan_that_cannot_run_is_left_out() -> None:
    trial = Trial(ONE, [1.0, 1.0], [BOTH, OTHER])
    assert trial.plan is BOTH
    trial.drop()
    assert trial.plan is OTHER
    trial.drop()
    assert trial.is_over
    assert trial.winner.plan is ONE


def test_a_first_plan_that_may_not_stay_has_no_turn() -> None:
    trial = Trial(ONE, [0.1, 0.1], [BOTH, OTHER], first_may_stay=False)
    ran = run(trial, lambda plan: 5.0 if plan is BOTH else 1.0)
    assert ran == [BOTH] * (WARM_CUT + TIMED) + [OTHER] * (WARM_WHOLE + TIMED)
    assert trial.winner.plan is OTHER


def test_a_first_plan_that_may_not_stay_does_where_nothing_else_can_run() -> None:
    trial = Trial(ONE, [0.1, 0.1], [BOTH], first_may_stay=False)
    trial.drop()
    assert trial.is_over
    assert trial.winner.plan is ONE


def test_no_step_is_allowed_but_the_first_rival_is_looked_at() -> None:
    trial = Trial(ONE, [1.0, 1.0], [BOTH, OTHER], most_steps=0)
    assert run(trial, lambda _: 0.99) == [BOTH] * (WARM_CUT + TIMED)
    assert trial.winner.plan is ONE


@given(times=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4), noise=st.floats(0.0, 1.0), seed=st.integers())
def test_it_ends_in_time_and_the_winner_is_the_fastest_that_was_seen(
    times: list[float], noise: float, seed: int
) -> None:
    plans, random = [ONE, BOTH, OTHER, ALL], Random(seed)
    of_plan = {id(plan): seconds for plan, seconds in zip(plans, times, strict=True)}
    trial = Trial(ONE, [times[0]] * 2, plans[1:])
    ran = run(trial, lambda plan: of_plan[id(plan)] * (1 + noise * random.random()))
    assert len(ran) <= MOST_STEPS
    winner_s = of_plan[id(trial.winner.plan)]
    # Each plan that ran to its first timed step was seen at most `noise` slower than it is.
    assert winner_s <= (1 + TIE) * (1 + noise) * min(of_plan[id(plan)] for plan in (ONE, *ran))


@given(times=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3))
def test_without_noise_nothing_faster_than_the_winner_was_left_out(times: list[float]) -> None:
    of_plan = dict(zip(map(id, (ONE, BOTH, OTHER)), times, strict=True))
    trial = Trial(ONE, [times[0]] * 2, [BOTH, OTHER])
    run(trial, lambda plan: of_plan[id(plan)])
    assert of_plan[id(trial.winner.plan)] <= (1 + TIE) * min(times)


def test_the_verdict_says_what_was_tried_what_stays_and_what_idles() -> None:
    trial = Trial(ONE, [1.0, 1.0], [BOTH])
    run(trial, lambda plan: 1.0 if plan is ONE else 1.12)
    assert trial.verdict() == (
        "Tried with real steps: dev:0 1.00 s, dev:0+dev:1 (4 micro-batches, forward) 1.12 s; dev:0 stays. "
        "dev:1 stays idle: using it would cost +12 %."
    )
