"""Constraints: what they mean, what they forbid, and what is said if they cannot be met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement import Constraints, ManualPolicy, Problem, check_constraints, get_policy, make_plan
from lightning_hetero.plan import Execution, Plan
from lightning_hetero.testing.inventories import inventory_of

Measured = Callable[..., Problem]
POLICIES = ["auto", "measured", "even", "memory_first", "proportional", "exact", "dag", "heft", "interleaved"]


def six(measured: Measured, **options: Any) -> Problem:
    """Six units on three equal devices."""
    return measured([0.002] * 6, [1.0, 1.0, 1.0], **options)


def plan_of(name: str, problem: Problem) -> Plan:
    return make_plan(get_policy(name), problem)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("profiled", [True, False])
def test_pins_hold_and_the_longest_name_wins(measured: Measured, name: str, profiled: bool) -> None:
    problem = six(measured, constraints=Constraints(pins={"u": "dev:1", "u.2": "dev:2", "u.0": "dev:0"}))
    plan = plan_of(name, problem if profiled else replace(problem, profile=None))
    assert list(plan.device_of.values()) == ["dev:0", "dev:1", "dev:2", "dev:1", "dev:1", "dev:1"]


@pytest.mark.parametrize("name", POLICIES)
def test_what_must_be_together_is(measured: Measured, name: str) -> None:
    device_of = plan_of(name, six(measured, constraints=Constraints(together=(("u.0", "u.5"),)))).device_of
    assert device_of["u.0"] == device_of["u.5"]


@pytest.mark.parametrize("name", [*POLICIES, "single"])
@pytest.mark.parametrize("profiled", [True, False])
def test_forbidden_devices_stay_empty(measured: Measured, name: str, profiled: bool) -> None:
    problem = six(measured, constraints=Constraints(forbidden=("dev:0", "dev:2")))
    assert set(plan_of(name, problem if profiled else replace(problem, profile=None)).device_of.values()) == {"dev:1"}


@pytest.mark.parametrize("name", POLICIES)
def test_the_batch_and_private_modules_stay_on_trusted_devices(measured: Measured, name: str) -> None:
    rules = Constraints(trusted=("dev:0",), private=("u.3",))
    device_of = plan_of(name, six(measured, constraints=rules, schedules=("forward",), micro_batches=4)).device_of
    assert device_of["u.0"] == "dev:0"  # it is fed with the batch
    assert device_of["u.3"] == "dev:0"
    if name in ("even", "proportional"):
        assert "dev:2" in device_of.values()  # what trusted units send on may go anywhere


def test_every_unit_that_own_code_feeds_sees_the_batch(measured: Measured) -> None:
    problem = six(measured, constraints=Constraints(trusted=("dev:0",)))
    assert problem.profile is not None
    fed = tuple(replace(f, source="") if f.target == "u.4" else f for f in problem.profile.flows)
    problem = replace(problem, profile=replace(problem.profile, flows=fed))
    device_of = dict.fromkeys(problem.graph.names, "dev:0")
    check_constraints(device_of | {"u.3": "dev:1"}, problem)
    with pytest.raises(
        PlacementError,
        match=r"'u.4' sees the batch, or what the model's own code made of it, so it needs a trusted device \(dev:0\), "
        r"but the placement has it on 'dev:1'. Change the placement, or loosen the constraint.",
    ):
        check_constraints(device_of | {"u.4": "dev:1"}, problem)


def test_without_flows_nobody_knows_what_sees_the_batch(measured: Measured) -> None:
    problem = replace(six(measured, constraints=Constraints(trusted=("dev:0", "dev:1"))), profile=None)
    assert set(plan_of("even", problem).device_of.values()) == {"dev:0", "dev:1"}
    with pytest.raises(PlacementError, match=r"'u.5' may see the batch \(what flows where is not known without a pro"):
        make_plan(ManualPolicy({"u.5": "dev:2", "": "dev:0"}), problem)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"pins": {"u.9": "dev:0"}}, r"pins: no unit is named 'u.9' or lies below it. Did you mean 'u.\d'"),
        ({"pins": {"u.1": "dev:7"}}, r"pins, entry 'u.1': unknown device 'dev:7'. Did you mean 'dev:\d'\?"),
        ({"together": (("u.0", "v"),)}, "together: no unit is named 'v'"),
        ({"forbidden": ("dve:0",)}, r"forbidden: unknown device 'dve:0'. Did you mean 'dev:0'\? Devices here: dev:0,"),
        ({"trusted": ("dev:0", "cpu")}, "trusted: unknown device 'cpu'"),
        ({"trusted": ("dev:1",)}, "the root 'dev:0' is not trusted, but the batch, the labels and the loss are there"),
        ({"private": ("u.1",)}, "private: 'u.1' has to stay on trusted devices, but none are named"),
        ({"trusted": ("dev:0",), "private": ("w.1",)}, "private: no unit is named 'w.1'"),
    ],
    ids=str,
)
def test_names_that_do_not_exist_are_refused_with_the_nearest(
    measured: Measured, rules: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        six(measured, constraints=Constraints(**rules))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_factor": -1.0}, r"optimizer_factor must be at least 0 \(Adam: 2, SGD: 0\), got -1.0"),
        ({"optimizer_factor": float("nan")}, "optimizer_factor must be at least 0"),
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0; 1 leaves the batch in one piece"),
        (
            {"objective": "step_tme"},
            r"unknown objective 'step_tme'. Did you mean 'step_time'\? Known are step_time, lat",
        ),
        ({"schedules": ("1f1",)}, r"unknown schedule '1f1'. Did you mean '1f1b'\?"),
        ({"schedules": ()}, "no schedule. A plan needs at least one of whole, forward, "),
        ({"schedules": ("whole",), "micro_batches": 4}, "4 micro-batches cannot run as 'whole'"),
    ],
    ids=str,
)
def test_a_problem_that_makes_no_sense_is_refused(measured: Measured, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        six(measured, **options)


def test_the_profile_of_another_model_is_refused(measured: Measured) -> None:
    other = measured([0.001] * 7, [1.0, 1.0, 1.0]).profile
    with pytest.raises(PlacementError, match=r"the profile is of another model: 'u\.6' is no unit of this one"):
        replace(six(measured), profile=other)


@pytest.mark.parametrize("name", [*POLICIES, "single"])
def test_rules_that_leave_no_device_say_which_they_are(measured: Measured, name: str) -> None:
    rules = Constraints(pins={"u.2": "dev:1"}, together=(("u.2", "u.3"),), trusted=("dev:0",), private=("u.3",))
    message = (
        r"no device is left for 'u.2': 'u.2', 'u.3' stand together, and 'u.2' is pinned to 'dev:1'; 'u.3' is private, "
        r"so it needs a trusted device \(dev:0\). Devices that units may use: dev:0, dev:1, dev:2. Loosen one of these"
    )
    with pytest.raises(PlacementError, match=message):
        plan_of(name, six(measured, constraints=rules))


def test_all_devices_forbidden(measured: Measured) -> None:
    with pytest.raises(PlacementError, match=r"no device is left to place units on: dev:0, dev:1, dev:2 can train"):
        plan_of("auto", six(measured, constraints=Constraints(forbidden=("dev:0", "dev:1", "dev:2"))))


def test_single_says_which_rule_keeps_it_from_one_device(measured: Measured) -> None:
    rules = Constraints(pins={"u.2": "dev:1", "u.4": "dev:2"})
    message = (
        r"'single' puts all units on one device, but constraints leave none for all of them: 'u.\d' may stand on dev"
    )
    with pytest.raises(PlacementError, match=message):
        plan_of("single", six(measured, constraints=rules))


def test_a_policy_that_breaks_a_rule_is_caught(measured: Measured) -> None:
    problem = six(measured, constraints=Constraints(together=(("u.0", "u.1"),)))
    message = "'u.0', 'u.1' must stand together, but the placement has them on 'dev:0' and 'dev:1'"
    with pytest.raises(PlacementError, match=message):
        make_plan(ManualPolicy({"u.1": "dev:1", "": "dev:0"}), problem)


@pytest.mark.parametrize("name", [*POLICIES, "single"])
def test_what_fits_nowhere_is_refused_with_a_table_and_ways_out(measured: Measured, name: str) -> None:
    problem = six(measured, memory=[2000, 3000, 2500], constraints=Constraints(pins={"u.1": "dev:0"}))
    with pytest.raises(InfeasiblePlanError) as caught:
        plan_of(name, problem)
    text = str(caught.value)
    assert text.startswith(f"placement '{name}' found no plan that fits. The nearest one (")
    assert "device" in text
    assert "needed" in text
    assert "too much" in text
    for way in ("rematerialize=True", "looser constraints (pins)", "more devices", "an optimizer with less state"):
        assert way in text
    assert ("placement='auto'" in text) == (name != "auto")


def test_rematerialization_is_not_proposed_where_it_is_on_already(measured: Measured) -> None:
    with pytest.raises(InfeasiblePlanError) as caught:
        plan_of("exact", six(measured, memory=1000, rematerialize=None))
    assert "rematerialize" not in str(caught.value).partition("Try: ")[2]


def test_rematerialization_is_chosen_where_activations_do_not_fit(measured: Measured) -> None:
    options = {"memory": 12_000, "saved_bytes": 400.0, "training": True, "schedules": ("whole", "forward")}
    with pytest.raises(InfeasiblePlanError):
        plan_of("exact", six(measured, **options))
    plan = plan_of("exact", six(measured, rematerialize=None, **options))
    assert plan.execution.rematerialize


def test_a_manual_map_leaves_the_rest_to_auto_under_the_same_rules(measured: Measured) -> None:
    problem = six(measured, constraints=Constraints(forbidden=("dev:2",)))
    plan = make_plan(ManualPolicy({"u.5": "dev:1", "": "auto"}), problem)
    assert plan.device_of["u.5"] == "dev:1"
    assert "dev:2" not in plan.device_of.values()
    assert plan.notes[0] == "1 of 6 units are placed by hand."
    assert plan.notes[1].startswith("The rest: Of ")


def test_devices_that_were_not_measured_are_left_out(measured: Measured) -> None:
    problem = six(measured)
    assert problem.profile is not None
    known = ("dev:0", "dev:1")
    units = tuple(
        replace(
            unit,
            forward_s={device: unit.forward_s[device] for device in known},
            backward_s={device: unit.backward_s[device] for device in known},
        )
        for unit in problem.profile.units
    )
    problem = replace(problem, profile=replace(problem.profile, units=units))
    for name in POLICIES:
        assert set(plan_of(name, problem).device_of.values()) <= set(known)
    by_hand = make_plan(ManualPolicy({"": "dev:2"}), problem)
    assert (by_hand.forecast, by_hand.execution) == (None, Execution())


@pytest.mark.parametrize(
    ("micro_batches", "schedules", "expected"),
    [
        (None, ("whole", "forward"), Execution()),
        (4, ("whole", "forward"), Execution(micro_batches=4, schedule="forward")),
        (3, ("1f1b",), Execution(micro_batches=3, schedule="1f1b")),
    ],
)
def test_without_a_profile_a_spread_plan_runs_as_asked(
    micro_batches: int | None, schedules: tuple[str, ...], expected: Execution
) -> None:
    from torch import nn

    from lightning_hetero.graph.find import find_units

    graph = find_units(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    problem = Problem(graph=graph, inventory=inventory_of("a", "b"), micro_batches=micro_batches, schedules=schedules)
    plan = plan_of("even", problem)
    assert len(plan.used) == 2
    assert plan.execution == expected
    assert plan.forecast is None


def test_auto_says_what_each_rule_costs(measured: Measured) -> None:
    """Two devices share the rows in half the time of one; u.0 on the root is no loss."""
    rules = Constraints(forbidden=("dev:1",), together=(("u.0", "u.1"),))
    notes = plan_of("auto", measured([0.002] * 6, [1.0, 1.0], constraints=rules)).notes
    assert any(
        note.startswith("The rule 'forbidden' costs +9") or note.startswith("The rule 'forbidden' costs +100 %")
        for note in notes
    )
    assert "The rule 'together' costs nothing: no better plan was found without it." in notes
    assert not any("'pins'" in note or "'trusted'" in note for note in notes)


def test_a_rule_that_costs_nothing_is_not_blamed_for_what_is_too_little_to_gain(measured: Measured) -> None:
    """Two devices save less than `auto` asks for, with the rules and without them."""
    rules = Constraints(pins={"u.0": "dev:0"}, together=(("u.0",),))
    low_s, high_s = 0.0, 4e-3
    for _ in range(12):  # the latency from which on one device is chosen
        latency_s = (low_s + high_s) / 2
        spread = len(plan_of("auto", measured([0.002] * 4, [1.0, 1.0], latency_s=latency_s)).used) > 1
        low_s, high_s = (latency_s, high_s) if spread else (low_s, latency_s)
    notes = plan_of("auto", measured([0.002] * 4, [1.0, 1.0], latency_s=high_s, constraints=rules)).notes
    for rule in ("pins", "together"):
        assert f"The rule '{rule}' costs nothing: no better plan was found without it." in notes
    (saved,) = [note for note in notes if note.startswith("dev:1 stays idle: using it would save")]
    words = saved.removeprefix("dev:1 stays idle: using it would save ").removesuffix(" asked.")
    less, asked = words.split(", less than the ")
    assert less != asked


def test_a_rule_whose_price_nobody_has_time_for_has_none(measured: Measured) -> None:
    problem = measured([0.002] * 6, [1.0, 1.0], constraints=Constraints(forbidden=("dev:1",)), out_of_time=lambda: True)
    assert not any(note.startswith("The rule") for note in plan_of("auto", problem).notes)
