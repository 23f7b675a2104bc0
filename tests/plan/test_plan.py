"""Plans as data: JSON round trip, damage, and the checks before anything moves."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.errors import InfeasiblePlanError, PlacementError, PlanFileError
from lightning_hetero.graph import ModelGraph
from lightning_hetero.graph.find import find_units
from lightning_hetero.plan import Plan, build_plan, check_plan, explain
from lightning_hetero.testing.inventories import inventory_of


def graph_of(*widths: int) -> ModelGraph:
    """A chain of linear layers."""
    return find_units(nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths))))


def plan_of(graph: ModelGraph, inventory: Inventory, *devices: str, **options: Any) -> Plan:
    return build_plan(graph, inventory, dict(zip(graph.names, devices, strict=True)), policy="test", **options)


def test_consecutive_units_on_one_device_form_a_stage() -> None:
    plan = plan_of(graph_of(2, 2, 2, 2), inventory_of("a", "b"), "a", "a", "b")
    assert [(stage.device, stage.units) for stage in plan.stages] == [("a", ("0", "1")), ("b", ("2",))]


def test_a_device_may_own_several_stages_and_its_needs_add_up() -> None:
    plan = plan_of(graph_of(2, 2, 2, 2), inventory_of("a", "b"), "a", "b", "a", training=False)
    assert [stage.device for stage in plan.stages] == ["a", "b", "a"]
    assert plan.need_of("a").total_bytes == 2 * 24


def test_training_needs_gradients_and_optimizer_state_too() -> None:
    plan = plan_of(graph_of(2, 2), inventory_of("a"), "a", optimizer_factor=2.0)
    need = plan.need_of("a")
    assert (need.parameters_bytes, need.gradients_bytes, need.optimizer_bytes) == (24, 24, 48)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=6), st.booleans(), st.sampled_from([0.0, 1.0, 2.0]))
def test_a_plan_survives_json(devices: list[str], training: bool, factor: float) -> None:
    graph = graph_of(*[2] * (len(devices) + 1))
    plan = plan_of(graph, inventory_of("a", "b"), *devices, notes=["why"], training=training, optimizer_factor=factor)
    assert Plan.from_json(plan.to_json()) == plan


PLAN = plan_of(graph_of(2, 2, 2), inventory_of("a", "b"), "a", "b")


STAGES, DEVICES, EXECUTION = (PLAN.to_dict()[name] for name in ("stages", "devices", "execution"))


def changed(**fields: Any) -> str:
    return json.dumps({**PLAN.to_dict(), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.to_json()[:-20], r"not valid JSON .* cut short or edited"),
        ("[1, 2]", r"not a plan of this package"),
        (changed(format="other"), r"'format' must be 'lightning_hetero.plan'"),
        (changed(version=99), r"has version 99, this package reads up to 1. Update lightning-hetero"),
        (changed(version="1"), r"version must be a whole number from 1 to 1, got '1'"),
        (changed(surprise=1), r"unknown field 'surprise'"),
        (changed(stages=[{"device": "a"}]), r"the plan is damaged: KeyError: 'units'"),
        (changed(devices=[]), r"the plan is damaged: a stage stands on '\w+', which is not among its devices"),
        (changed(stages=[{"device": 1, "units": [], "parameters": 0, "need": {}}]), r"damaged: TypeError"),
        (changed(devices=[{"name": "a"}]), r"the plan is damaged"),
        (json.dumps({k: v for k, v in PLAN.to_dict().items() if k != "notes"}), r"damaged: KeyError: 'notes'"),
        (changed(stages=[*STAGES, {**STAGES[0], "device": "b"}]), r"the plan is damaged: '0' stands in more than one"),
        (changed(stages=[*STAGES, {**STAGES[0], "units": []}]), r"the plan is damaged: a stage has no units"),
        (changed(seed=10**400), r"damaged: TypeError: expected a whole number >= 0 below 2\^63, got 1000"),
        (changed(optimizer_factor=10**400), r"damaged: TypeError: expected a finite number >= 0, got 1000"),
        (changed(devices=[{**DEVICES[0], "name": True}]), r"the name of a device must be a text, got True"),
        (changed(execution={**EXECUTION, "micro_batches": 10**6}), r"at most 4096 micro-batches, got 1000000: each"),
        (
            changed(execution={**EXECUTION, "micro_batches": 2, "schedule": "forward", "weights": [1e308, 1e308]}),
            r"weights are shares of the rows and need a finite sum, got \(1e\+308",
        ),
        ("[" * 100_000, r"the plan is not valid JSON"),
    ],
)
def test_a_damaged_foreign_or_newer_plan_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        Plan.from_json(text)


def test_what_does_not_fit_is_refused_with_need_against_limit_and_ways_out() -> None:
    graph = graph_of(100, 100, 100)
    plan = plan_of(graph, inventory_of("a", "b", memory="200KiB", b="100KiB"), "a", "b", optimizer_factor=2.0)
    with pytest.raises(InfeasiblePlanError) as caught:
        check_plan(plan, graph)
    text = str(caught.value)
    assert "policy 'test' needs 158 KiB on 'b', which has 100 KiB" in text
    assert [line.split() for line in text.splitlines() if line.startswith("  b ")] == [
        [
            "b",
            "39.5",
            "KiB",
            "39.5",
            "KiB",
            "78.9",
            "KiB",
            "0",
            "B",
            "158",
            "KiB",
            "100",
            "KiB",
            "57.8",
            "KiB",
            "too",
            "much",
        ]
    ]
    assert "The largest unit, '0' (Linear), takes about 158 KiB and cannot be split." in text
    assert "SGD" in text
    assert "bf16-true" in text


def test_a_unit_that_trains_needs_a_device_that_can_train() -> None:
    dla = DeviceSpec(name="dla:0", kind="dla", memory_bytes=1 << 30, torch_device=None, trainable=False)
    inventory = Inventory(devices=(*inventory_of("cpu").devices, dla))
    graph = graph_of(2, 2)
    with pytest.raises(PlacementError, match=r"'0' would be trained on 'dla:0', a dla that PyTorch cannot train on"):
        check_plan(plan_of(graph, inventory, "dla:0"), graph)


def test_tied_units_may_not_be_apart() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    graph = find_units(model)
    with pytest.raises(PlacementError, match=r"'1' on 'b' shares a parameter with '0' on 'a'"):
        check_plan(plan_of(graph, inventory_of("a", "b"), "a", "b"), graph)


def test_a_plan_must_place_every_unit_once_and_no_other() -> None:
    with pytest.raises(PlacementError, match=r"no device for '2'"):
        check_plan(PLAN, graph_of(2, 2, 2, 2))
    with pytest.raises(PlacementError, match=r"places '1', which is no unit of this model"):
        check_plan(PLAN, graph_of(2, 2))


def test_the_explanation_shows_stages_idle_devices_and_reasons() -> None:
    graph = graph_of(2, 2, 2)
    text = explain(plan_of(graph, inventory_of("a", "b"), "a", "a", notes=["b would be slower."]))
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "a", "0", "…", "1", "(2)", "12", "96", "B", "1.00", "GiB", "0", "%"] in rows
    assert ["b", "idle", "0", "0", "B", "1.00", "GiB", "0", "%"] in rows
    assert text.endswith("b would be slower.")
