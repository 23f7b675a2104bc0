"""Activation checkpointing, chosen where nothing fits without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.graph.model import Compound
from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.plan import Plan

Measured = Callable[..., Problem]
SAVED, ROWS, LAYER = 1000, 16, 2
KEPT_BYTES = (SAVED + 4) * ROWS  # by a unit, its input included
STATE_BYTES = 4 * 400  # of a unit: parameters, gradients, two states of Adam


def problem_of(measured: Measured, memory: list[int], **options: Any) -> Problem:
    """Layers of two units, `u.0.0`, `u.0.1`, `u.1.0` and so on, that keep much more than they take."""
    arguments = {"may_checkpoint": True, "schedules": ("whole",), **options}
    problem = measured([0.01] * 8, [1.0] * len(memory), memory=memory, rows=ROWS, saved_bytes=SAVED, **arguments)
    name = {f"u.{i}": f"u.{i // LAYER}.{i % LAYER}" for i in range(8)} | {"": ""}
    compounds = [Compound(name="u", is_layer=False, is_called=True)]
    compounds += [Compound(name=f"u.{i}", is_layer=True, is_called=True) for i in range(8 // LAYER)]
    units = tuple(replace(u, name=name[u.name], tied_to=name[u.name]) for u in problem.graph.units)
    graph = replace(problem.graph, units=units, compounds=tuple(compounds))
    profile = problem.profile
    assert profile is not None
    profile = replace(
        profile,
        model=graph.fingerprint,
        units=tuple(replace(unit, name=name[unit.name]) for unit in profile.units),
        flows=tuple(replace(f, source=name[f.source], target=name[f.target]) for f in profile.flows),
    )
    return replace(problem, graph=graph, profile=profile)


def planned(problem: Problem, policy: str) -> Plan:
    return make_plan(get_policy(policy), problem)


ENOUGH = 8 * (KEPT_BYTES + STATE_BYTES) + 10_000
SHORT = 4 * KEPT_BYTES + 8 * STATE_BYTES


@pytest.mark.parametrize("policy", ["auto", "exact", "dag", "proportional"])
def test_what_fits_in_no_other_way_runs_layers_again(measured: Measured, policy: str) -> None:
    plan = planned(problem_of(measured, [SHORT]), policy)
    assert plan.checkpointed == tuple(plan.device_of)
    assert plan.forecast is not None
    (device,) = plan.forecast.devices
    assert device.memory_bytes <= SHORT
    # One layer at a time has all that it keeps; of each of the others there is the input.
    assert device.memory_bytes >= 8 * STATE_BYTES + LAYER * KEPT_BYTES + 3 * 4 * ROWS
    assert plan.forecast.step_s == pytest.approx(8 * (0.01 + 0.02) + 8 * 0.01)
    (stage,) = plan.forecast.stages
    assert [stage.forward_s, stage.backward_s] == pytest.approx([0.08, 0.16 + 0.08])
    assert stage.kept_bytes == 4 * 4 * ROWS
    (why,) = [note for note in plan.notes if "activation checkpointing" in note]
    assert "Nothing fits with all activations kept: dev:0 lacks" in why
    assert why.endswith("which makes a step 33 % longer.")


def test_what_fits_keeps_its_activations(measured: Measured) -> None:
    plan = planned(problem_of(measured, [ENOUGH]), "auto")
    assert plan.checkpointed == ()
    assert not any("activation checkpointing" in note for note in plan.notes)


@pytest.mark.parametrize("policy", ["auto", "exact"])
def test_it_has_to_be_allowed(measured: Measured, policy: str) -> None:
    with pytest.raises(InfeasiblePlanError, match="found no plan that fits"):
        planned(problem_of(measured, [SHORT], may_checkpoint=False), policy)


def test_what_is_too_large_all_the_same_is_refused(measured: Measured) -> None:
    with pytest.raises(InfeasiblePlanError, match="found no plan that fits"):
        planned(problem_of(measured, [8 * STATE_BYTES + KEPT_BYTES]), "auto")


def test_only_devices_that_are_short_run_anything_again(measured: Measured) -> None:
    half = 4 * STATE_BYTES
    room = 4 * KEPT_BYTES + half + 2_000
    plan = planned(problem_of(measured, [room, 2 * KEPT_BYTES + half + 1_000]), "auto")
    again = {plan.device_of[unit] for unit in plan.checkpointed}
    assert again == {"dev:1"}
    assert len(plan.used) == 2
    assert plan.forecast is not None
    assert all(device.memory_bytes <= device.limit_bytes for device in plan.forecast.devices)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_model_that_cannot_run_twice_is_refused(measured: Measured) -> None:
    problem = problem_of(measured, [SHORT])
    with pytest.raises(InfeasiblePlanError):
        planned(replace(problem, graph=replace(problem.graph, compounds=())), "auto")
