"""Which plans `measured` and `auto` want tried with real steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement import (
    ManualPolicy,
    MeasuredPolicy,
    Placement,
    Problem,
    get_policy,
    make_plan,
    make_plans,
)
from lightning_hetero.placement.auto import CLOSE, LEAST_GAIN
from lightning_hetero.placement.compare import ELSEWHERE, HOPELESS
from lightning_hetero.plan import Plan

Measured = Callable[..., Problem]


def nearly_equal(measured: Measured) -> Problem:
    """Overheads eat up most of what a second device gains, and copies of parameters what replicas would."""
    return measured(
        [0.01] * 8, [1.0, 0.5, 0.25], overhead_s=0.005, launch_s=0.002, parameter_bytes=10**6, bytes_per_s=1e8
    )


def step_s(plan: Plan) -> float:
    assert plan.forecast is not None
    return plan.forecast.step_s


def kind(plan: Plan) -> tuple[frozenset[str], bool, int]:
    devices = frozenset(device.name for device in plan.used)
    return devices, plan.execution.schedule == "whole", plan.execution.micro_batches


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_finalists_differ_and_are_hopeful_and_the_first_is_the_best(count: int, measured: Measured) -> None:
    plans = make_plans(MeasuredPolicy(finalists=count), nearly_equal(measured))
    assert len(plans) == count
    for one, other in combinations(plans, 2):
        moved = sum(one.device_of[unit] != device for unit, device in other.device_of.items())
        assert kind(one) != kind(other) or moved > ELSEWHERE * len(one.device_of)
    assert step_s(plans[0]) == min(map(step_s, plans))
    assert all(step_s(plan) <= HOPELESS * step_s(plans[0]) for plan in plans)


def test_the_best_single_device_is_a_finalist(measured: Measured) -> None:
    problem = nearly_equal(measured)
    best, *others = make_plans(MeasuredPolicy(finalists=2), problem)
    assert len(best.used) > 1
    assert [plan.device_of for plan in others] == [make_plan(get_policy("single"), problem).device_of]


def test_a_single_device_that_is_far_slower_is_not_tried(measured: Measured) -> None:
    problem = measured([0.01] * 8, [1.0, 1.0, 1.0, 1.0], rows=64)
    for name in ("measured", "auto"):
        assert all(len(plan.used) > 1 for plan in make_plans(get_policy(name), problem))
    assert len(make_plans(get_policy("auto"), problem)) == 1


def test_auto_doubts_a_small_gain(measured: Measured) -> None:
    problem = measured([0.01] * 8, [1.0, 0.5, 0.25], overhead_s=0.001, launch_s=0.002)
    pick, home = make_plans(get_policy("auto"), problem)
    assert len(pick.used) > 1
    assert home.device_of == make_plan(get_policy("single"), problem).device_of
    assert step_s(pick) < step_s(home) < HOPELESS * step_s(pick)


def test_auto_doubts_a_small_loss(measured: Measured) -> None:
    problem = nearly_equal(measured)
    pick, rival = make_plans(get_policy("auto"), problem)
    assert len(pick.used) == 1 < len(rival.used)
    assert step_s(pick) * (1 - LEAST_GAIN) < step_s(rival) < step_s(pick) * (1 + CLOSE)


def test_auto_doubts_nothing_where_one_device_is_best(measured: Measured) -> None:
    plan, *others = make_plans(get_policy("auto"), measured([0.01] * 4, [1.0, 0.01]))
    assert len(plan.used) == 1
    assert others == []


def test_a_device_map_with_a_rest_keeps_what_is_placed_by_hand_in_every_finalist(measured: Measured) -> None:
    plans = make_plans(ManualPolicy({"u.0": "dev:1", "": "auto"}), nearly_equal(measured))
    assert {plan.device_of["u.0"] for plan in plans} == {"dev:1"}


def test_without_a_profile_measured_does_what_auto_does(measured: Measured) -> None:
    problem = replace(nearly_equal(measured), profile=None)
    assert make_plan(get_policy("measured"), problem).device_of == make_plan(get_policy("auto"), problem).device_of


def test_a_finalist_that_does_not_fit_is_left_out(measured: Measured) -> None:
    class WithAnother:
        name = "with_another"

        def place(self, problem: Problem) -> Placement:
            names = problem.graph.names
            return Placement(
                device_of=dict.fromkeys(names, "dev:0"),
                finalists=(Placement(device_of=dict.fromkeys(names, "dev:1")),),
            )

    fits, too_small = measured([0.01] * 4, [1.0, 1.0]), measured([0.01] * 4, [1.0, 1.0], memory=[1 << 30, 100])
    assert len(make_plans(WithAnother(), fits)) == 2
    assert len(make_plans(WithAnother(), too_small)) == 1


def test_no_finalist_is_an_error(measured: Measured) -> None:
    with pytest.raises(PlacementError, match="policy 'measured' needs at least 1 finalist, got 0"):
        MeasuredPolicy(finalists=0).place(nearly_equal(measured))
