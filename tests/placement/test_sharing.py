"""Policies that put a model, or its stages, on several devices that share the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement import Constraints, Problem, get_policy, make_plan
from lightning_hetero.plan import Execution, Plan, Share, check_plan
from lightning_hetero.simulate import Costs, predict

Measured = Callable[..., Problem]
EVEN_WORK = [0.001] * 6


def step_s(plan: Plan) -> float:
    assert plan.forecast is not None
    return plan.forecast.step_s


def shares(plan: Plan) -> dict[str, float]:
    """The shares of a plan with one stage."""
    (stage,) = plan.stages
    total = sum(share.share for share in stage.shares)
    return {share.device: share.share / total for share in stage.shares}


def test_rows_are_shared_by_speed(measured: Measured) -> None:
    plan = make_plan(get_policy("replicate"), measured(EVEN_WORK, [1.0, 3.0], rows=16))
    assert shares(plan) == {"dev:0": 0.25, "dev:1": 0.75}
    alone = make_plan(get_policy("single"), measured(EVEN_WORK, [1.0, 3.0], rows=16))
    assert step_s(plan) == pytest.approx(0.75 * step_s(alone), rel=0.01)


def test_a_device_that_does_not_help_stays_idle(measured: Measured) -> None:
    """The copies of parameters over a slow link cost more than it saves."""
    plan = make_plan(get_policy("replicate"), measured(EVEN_WORK, [1.0, 1.0], bytes_per_s=1e5))
    assert [device.name for device in plan.used] == ["dev:0"]
    assert not plan.shares_of


def test_a_device_gets_no_more_rows_than_fit(measured: Measured) -> None:
    room = 40_000
    problem = measured(EVEN_WORK, [1.0, 3.0], memory=[1 << 30, room], saved_bytes=600.0)
    plan = make_plan(get_policy("replicate"), problem)
    assert plan.forecast is not None
    peak = {device.device: device.memory_bytes for device in plan.forecast.devices}
    assert peak["dev:1"] <= room
    assert 0 < shares(plan)["dev:1"] < 0.75


def test_a_batch_that_must_not_be_cut_is_not_shared(measured: Measured) -> None:
    plan = make_plan(get_policy("replicate"), measured(EVEN_WORK, [1.0, 1.0], schedules=("whole",)))
    assert not plan.shares_of
    assert len(plan.used) == 1


def test_a_number_of_micro_batches_is_kept(measured: Measured) -> None:
    plan = make_plan(get_policy("replicate"), measured(EVEN_WORK, [1.0, 3.0], micro_batches=4))
    assert plan.execution.micro_batches == 4
    check_plan(plan, measured(EVEN_WORK, [1.0, 3.0]).graph)


def test_forbidden_devices_get_no_share(measured: Measured) -> None:
    problem = measured(EVEN_WORK, [1.0, 1.0, 1.0], constraints=Constraints(forbidden=("dev:1",)))
    for name in ("replicate", "hybrid", "auto"):
        assert "dev:1" not in {device.name for device in make_plan(get_policy(name), problem).used}


def test_a_slow_stage_gets_several_devices(measured: Measured) -> None:
    """Two units, one of which takes twice as long, use three equal devices only in this way."""
    problem = measured([0.010, 0.020], [1.0, 1.0, 1.0], rows=64, micro_batches=16)
    plan = make_plan(get_policy("hybrid"), problem)
    assert [len(stage.shares) for stage in plan.stages] == [0, 2]
    ideal_s = (16 + 1) * 3 * 0.010 / 16
    assert step_s(plan) < 1.2 * ideal_s
    assert step_s(plan) < step_s(make_plan(get_policy("exact"), problem))


def test_hybrid_needs_three_devices(measured: Measured) -> None:
    plan = make_plan(get_policy("hybrid"), measured([0.01, 0.02], [1.0, 1.0]))
    assert len(plan.used) == 1


def test_auto_shares_rows_where_that_is_best(measured: Measured) -> None:
    """One unit cannot be cut into stages."""
    problem = measured([0.010], [1.0, 3.0])
    plan = make_plan(get_policy("auto"), problem)
    assert shares(plan) == {"dev:0": 0.25, "dev:1": 0.75}
    assert "'replicate'" in " ".join(plan.notes)


@st.composite
def small(draw: st.DrawFn) -> dict[str, Any]:
    devices = draw(st.integers(2, 3))
    return {
        "work_s": draw(st.lists(st.sampled_from([0.001, 0.003]), min_size=1, max_size=3)),
        "speeds": draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=devices, max_size=devices)),
        "memory": draw(st.lists(st.integers(2_000, 20_000), min_size=devices, max_size=devices)),
        "rows": draw(st.integers(2, 9)),
        "launch_s": draw(st.sampled_from([0.0, 0.0002])),
        "overhead_s": draw(st.sampled_from([0.0, 0.0003])),
        "bytes_per_s": draw(st.sampled_from([1e6, 1e9])),
    }


@given(arguments=small())
@settings(max_examples=60, deadline=None)
def test_no_other_shares_are_much_better(measured: Measured, arguments: dict[str, Any]) -> None:
    """Against all ways to deal out the rows, with every owner."""
    problem = measured(**arguments)
    best_s = min(least_s(problem), step_s_or_inf("single", problem))
    found_s = step_s_or_inf("replicate", problem)
    assert found_s <= 1.1 * best_s


def step_s_or_inf(policy: str, problem: Problem) -> float:
    try:
        return step_s(make_plan(get_policy(policy), problem))
    except InfeasiblePlanError:
        return float("inf")


def least_s(problem: Problem) -> float:
    assert problem.profile is not None
    costs = Costs(problem.graph, problem.inventory, problem.profile, problem.training, problem.optimizer_factor)
    names = [device.name for device in problem.inventory]
    best_s = float("inf")
    for rows in compositions(problem.profile.rows, len(names)):
        got = [Share(device=name, share=float(count)) for name, count in zip(names, rows, strict=True) if count]
        if len(got) < 2:
            continue
        for first in got:
            ordered = (first, *(share for share in got if share is not first))
            execution = Execution(
                micro_batches=len(ordered), schedule="forward", weights=tuple(share.share for share in ordered)
            )
            everywhere = dict.fromkeys(problem.graph.names, ordered)
            owner = dict.fromkeys(problem.graph.names, first.device)
            prediction = predict(costs, owner, execution, everywhere)
            if prediction.fits:
                best_s = min(best_s, prediction.forecast.step_s)
    return best_s


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of so many numbers from 0 on."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)
