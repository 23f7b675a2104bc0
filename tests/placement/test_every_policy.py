"""What every placement policy promises, whatever it decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.graph import ModelGraph, Unit
from lightning_hetero.placement import ExactPolicy, ManualPolicy, PlacementPolicy, Problem, get_policy, make_plan
from lightning_hetero.plan import check_plan
from lightning_hetero.testing.inventories import inventory_of

SEARCHES = ["proportional", "exact", "dag", "heft", "interleaved", "replicate", "hybrid"]
POLICIES = ["auto", "measured", "single", "even", "memory_first", *SEARCHES, "round_robin", "map"]


def policy_named(name: str) -> PlacementPolicy:
    if name == "exact":
        return ExactPolicy(one_by_one=100)  # both ways to solve, and quick
    return ManualPolicy({"": "auto"}) if name == "map" else get_policy(name)


@st.composite
def graphs(draw: st.DrawFn) -> ModelGraph:
    """Up to eight units of any size, some tied, some without parameters."""
    units: list[Unit] = []
    for index in range(draw(st.integers(0, 8))):
        size = draw(st.integers(0, 1000))
        earlier = [unit.tied_to for unit in units if unit.parameters]
        tied = draw(st.sampled_from([None, None, *earlier])) if size else None
        units.append(
            Unit(
                name=f"u{index}",
                kind="Linear",
                parameters=size,
                parameter_bytes=4 * size,
                trainable_bytes=draw(st.sampled_from([0, 4 * size])),
                buffer_bytes=draw(st.integers(0, 100)),
                tied_to=tied or f"u{index}",
            )
        )
    return ModelGraph(units=tuple(units), loose_parameter_bytes=draw(st.integers(0, 100)))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    names = [f"dev:{index}" for index in range(draw(st.integers(1, 4)))]
    sizes = {name.replace(":", "_"): draw(st.integers(200, 20_000)) for name in names}
    return Problem(
        graph=draw(graphs()),
        inventory=inventory_of(*names, **sizes),
        training=draw(st.booleans()),
        optimizer_factor=draw(st.sampled_from([0.0, 1.0, 2.0])),
    )


@pytest.mark.parametrize("name", POLICIES)
@given(problem=problems())
@settings(max_examples=100, deadline=None)
def test_a_plan_passes_the_check_or_is_refused_for_memory(name: str, problem: Problem) -> None:
    plan = make_plan(policy_named(name), problem)
    try:
        check_plan(plan, problem.graph)
    except InfeasiblePlanError:
        assert any(plan.need_of(d.name).total_bytes > d.memory_bytes for d in problem.inventory)


@pytest.mark.parametrize("name", POLICIES)
@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_the_same_problem_gets_the_same_plan(name: str, problem: Problem) -> None:
    assert make_plan(policy_named(name), problem) == make_plan(policy_named(name), problem)


@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_auto_uses_one_device_whenever_one_is_enough(problem: Problem) -> None:
    plan = make_plan(get_policy("auto"), problem)
    need = problem.need_bytes(problem.graph.units)
    if any(need <= room for room in problem.room_bytes().values()):
        assert len(plan.used) <= 1
        check_plan(plan, problem.graph)


@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_memory_first_finds_room_if_filling_in_order_does(problem: Problem) -> None:
    """An independent account of the simplest way to fill devices; if that fits, the policy must not fail."""
    rooms = list(problem.room_bytes().values())
    device = 0
    for group in problem.graph.groups:
        need = problem.need_bytes(group)
        while device < len(rooms) and rooms[device] < need:
            device += 1
        if device == len(rooms):
            return
        rooms[device] -= need
    check_plan(make_plan(get_policy("memory_first"), problem), problem.graph)
