"""Plans with replicas: through JSON, checked, and explained."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.errors import InfeasiblePlanError, PlacementError, PlanFileError, ScheduleError
from lightning_hetero.graph import ModelGraph
from lightning_hetero.graph.find import find_units
from lightning_hetero.plan import Execution, Plan, Share, build_plan, check_plan, explain
from lightning_hetero.testing.inventories import inventory_of


def graph_of(*widths: int) -> ModelGraph:
    """A chain of linear layers."""
    return find_units(nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths))))


def shares(**of: float) -> tuple[Share, ...]:
    return tuple(Share(device=device, share=share) for device, share in of.items())


def plan_of(*placed: tuple[Share, ...], memory: Any = "1GiB", **options: Any) -> Plan:
    """A plan for a chain of layers on the devices a, b and c."""
    graph = graph_of(*[2] * (len(placed) + 1))
    options = {"execution": Execution(micro_batches=4, schedule="forward"), **options}
    return build_plan(
        graph,
        inventory_of("a", "b", "c", memory=memory),
        {name: of[0].device for name, of in zip(graph.names, placed, strict=True)},
        policy="test",
        shares_of={name: of for name, of in zip(graph.names, placed, strict=True) if len(of) > 1},
        **options,
    )


def check(plan: Plan) -> None:
    check_plan(plan, graph_of(*[2] * (1 + sum(len(stage.units) for stage in plan.stages))))


BOTH = shares(a=3, b=1)


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 100), min_size=2, max_size=2),
)
def test_a_plan_with_replicas_survives_json(places: list[list[str]], parts: list[float], weights: list[float]) -> None:
    placed = [shares(**dict(zip(devices, parts, strict=False))) for devices in places]
    execution = Execution(micro_batches=2, schedule="forward", weights=tuple(weights))
    plan = plan_of(*placed, execution=execution)
    assert Plan.from_json(plan.to_json()) == plan
    assert [plan.shares_of.get(str(index), ()) for index in range(len(placed))] == [
        of if len(of) > 1 else () for of in placed
    ]


def test_a_plan_of_an_earlier_release_has_no_replicas() -> None:
    data = plan_of(shares(a=1), shares(b=1)).to_dict()
    for stage in data["stages"]:
        del stage["shares"]
    del data["execution"]["weights"]
    plan = Plan.from_json(json.dumps(data))
    assert plan == plan_of(shares(a=1), shares(b=1))
    check(plan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stage: stage["shares"][0].pop("share"), "damaged: KeyError: 'share'"),
        (lambda stage: stage["shares"][0].update(share="3"), "damaged: TypeError"),
        (lambda stage: stage["shares"][0].update(rows=3), "damaged"),
        (lambda stage: stage.update(shares={"a": 3}), "damaged"),
    ],
)
def test_damaged_shares_are_refused(damage: Any, message: str) -> None:
    data = plan_of(BOTH).to_dict()
    data = json.loads(json.dumps(data))
    damage(data["stages"][0])
    with pytest.raises(PlanFileError, match=message):
        Plan.from_dict(data)


def test_units_with_other_replicas_are_another_stage() -> None:
    plan = plan_of(shares(a=1), BOTH, BOTH, shares(a=1, b=1))
    assert [(stage.units, stage.shares) for stage in plan.stages] == [
        (("0",), ()),
        (("1", "2"), BOTH),
        (("3",), shares(a=1, b=1)),
    ]
    assert plan.device_of == dict.fromkeys("0123", "a")
    assert [device.name for device in plan.used] == ["a", "b"]
    assert plan.torch_devices == ("a", "b")
    check(plan)


def test_a_replica_needs_room_for_parameters_and_gradients() -> None:
    plan = plan_of(BOTH, shares(a=1), optimizer_factor=2.0)
    assert [plan.need_of(device).total_bytes for device in "abc"] == [2 * 24 * 4, 24 * 2, 0]
    assert plan.need_of("b").optimizer_bytes == 0
    with pytest.raises(InfeasiblePlanError, match="needs 48 B on 'b', which has 40 B"):
        check(replace(plan, devices=inventory_of("a", "b", "c", b=40).devices))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"shares": shares(b=1, a=1)},
            r"replicas of '0' have to be on different devices, that of its parameters \('a'\) first; got \['b', 'a'\]",
        ),
        ({"shares": (*BOTH, *BOTH)}, r"have to be on different devices.*got \['a', 'b', 'a', 'b'\]"),
        (
            {"shares": shares(a=1, b=0)},
            r"every replica of '0' needs a share above 0, got a: 1, b: 0. Leave out who gets n",
        ),
        (
            {"shares": shares(a=1, z=1)},
            r"a replica of '0' would be trained on 'z', which is no device that can train here: a, b, c",
        ),
    ],
)
def test_replicas_that_make_no_sense_are_refused(stage: dict[str, Any], message: str) -> None:
    plan = plan_of(BOTH)
    with pytest.raises(PlacementError, match=message):
        check(replace(plan, stages=(replace(plan.stages[0], **stage),)))


def test_a_replica_that_trains_needs_a_device_that_can_train() -> None:
    dla = DeviceSpec(name="dla:0", kind="dla", memory_bytes=1 << 30, torch_device=None, trainable=False)
    plan = plan_of(BOTH)
    stage = replace(plan.stages[0], shares=(BOTH[0], Share(device="dla:0", share=1)))
    plan = replace(plan, stages=(stage,), devices=Inventory(devices=(*plan.devices, dla)).devices)
    with pytest.raises(
        PlacementError, match="a replica of '0' would be trained on 'dla:0', which is no device that can"
    ):
        check(plan)


def test_one_micro_batch_cannot_be_shared() -> None:
    with pytest.raises(
        PlacementError,
        match=r"replicas share a batch by its micro-batches, and there is only 1\. Set micro_batches to at least the",
    ):
        check(plan_of(BOTH, execution=Execution()))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, 2.0, 3.0), (1.0, -1.0)])
def test_weights_are_one_for_each_micro_batch(weights: tuple[float, ...]) -> None:
    with pytest.raises(ScheduleError, match="one above 0 for each of the 2 micro-batches"):
        Execution(micro_batches=2, schedule="forward", weights=weights)


def test_the_table_has_a_row_for_each_replica() -> None:
    text = explain(plan_of(shares(a=1), BOTH, optimizer_factor=0.0))
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "a", "0", "6", "48", "B", "1.00", "GiB", "0", "%"] in rows
    assert ["1", "a", "(75", "%)", "1", "6", "48", "B", "1.00", "GiB", "0", "%"] in rows
    assert ["1", "b", "(25", "%)", "1", "replica", "48", "B", "1.00", "GiB", "0", "%"] in rows
    assert ["c", "idle", "0", "0", "B", "1.00", "GiB", "0", "%"] in rows
