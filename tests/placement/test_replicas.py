"""Replicas in device maps: what users may write, what it means, and which rules hold for every replica."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Constraints, ManualPolicy, Problem, make_plan, make_plans
from lightning_hetero.plan import Execution, Plan, Share, check_plan
from lightning_hetero.testing.inventories import inventory_of

BOTH = (Share(device="a", share=3.0), Share(device="b", share=1.0))


def chain(layers: int = 3) -> nn.Module:
    """Equal layers; each needs 440 bytes of parameters, 1760 in training with Adam, 880 as a replica."""
    return nn.Sequential(*(nn.Linear(10, 10) for _ in range(layers)))


def problem_of(model: nn.Module | None = None, memory: Any = "1GiB", **options: Any) -> Problem:
    inventory = options.pop("inventory", None) or inventory_of("a", "b", "c", memory=memory)
    return Problem(graph=find_units(model or chain()), inventory=inventory, **options)


def plan_of(device_map: dict[str, Any], problem: Problem | None = None) -> Plan:
    return make_plan(ManualPolicy(device_map), problem or problem_of())


def test_the_whole_model_on_several_devices() -> None:
    plan = plan_of({"": {"a": 3, "b": 1}})
    assert [(stage.device, stage.shares) for stage in plan.stages] == [("a", BOTH)]
    assert plan.execution == Execution(micro_batches=2, schedule="forward", weights=(3.0, 1.0))


def test_one_stage_of_several() -> None:
    plan = plan_of({"0": "c", "": {"a": 3, "b": 1}})
    assert [(stage.device, stage.units, stage.shares) for stage in plan.stages] == [
        ("c", ("0",), ()),
        ("a", ("1", "2"), BOTH),
    ]
    assert plan.execution == Execution(micro_batches=4, schedule="forward")


def test_stages_with_replicas_of_their_own() -> None:
    plan = plan_of({"0": {"a": 1, "b": 1}, "1": {"b": 1, "a": 1, "c": 2}, "": "c"})
    assert [[(share.device, share.share) for share in stage.shares] for stage in plan.stages] == [
        [("a", 1.0), ("b", 1.0)],
        [("b", 1.0), ("a", 1.0), ("c", 2.0)],
        [],
    ]
    assert plan.execution.micro_batches == 6


@pytest.mark.parametrize(
    ("count", "weights"), [(None, (3.0, 1.0)), (2, (3.0, 1.0)), (4, (3.0, 1.0, 3.0, 1.0)), (3, ()), (5, ())]
)
def test_micro_batches_are_as_large_as_shares_where_they_come_out_even(
    count: int | None, weights: tuple[float, ...]
) -> None:
    execution = plan_of({"": {"a": 3, "b": 1}}, problem_of(micro_batches=count)).execution
    assert (execution.micro_batches, execution.weights) == (count or 2, weights)


def test_a_schedule_of_steps_and_rematerialization() -> None:
    shares = {"": {"a": 3, "b": 1}}
    assert plan_of(shares, problem_of(schedules=("1f1b",))).execution.schedule == "1f1b"
    assert plan_of(shares, problem_of(rematerialize=True)).execution.rematerialize
    assert plan_of(shares, problem_of(schedules=("whole",))).execution.schedule == "forward"


def test_one_device_of_a_mapping_is_that_device() -> None:
    plan = plan_of({"": {"b": 7}})
    assert plan.stages[0].device == "b"
    assert plan.stages[0].shares == ()


def test_devices_by_kind_and_by_number() -> None:
    problem = problem_of(inventory=inventory_of("cpu", "cuda:0", "cuda:1"))
    plan = plan_of({"": {1: 2, 0: 1.5, "cpu": 0.5}}, problem)
    assert [(share.device, share.share) for share in plan.stages[0].shares] == [
        ("cuda:1", 2.0),
        ("cuda:0", 1.5),
        ("cpu", 0.5),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"device map, entry '': replicas need at least one device, such as \{\"cuda:0\": 3, \"cuda:1\": 1\}"),
        (
            {"a": 0},
            r"device map, entry '': the share of 'a' has to be a number above 0, got 0. It says how much of a batc",
        ),
        ({"a": -1.0, "b": 1}, r"the share of 'a' has to be a number above 0, got -1.0"),
        ({"a": "3"}, r"the share of 'a' has to be a number above 0, got '3'"),
        ({"a": True}, r"the share of 'a' has to be a number above 0, got True"),
        ({"a": None}, r"the share of 'a' has to be a number above 0, got None"),
        ({"a": float("nan")}, r"the share of 'a' has to be a number above 0, got nan"),
        ({"a": float("inf"), "b": 1}, r"the share of 'a' has to be a number above 0, got inf"),
        ({"a": {"b": 1}}, r"the share of 'a' has to be a number above 0, got \{'b': 1\}"),
        ({"auto": 1, "b": 1}, r"replicas have to be on different devices, written by name; got \['auto', 'b'\]"),
        ({"z": 1, "b": 1}, r"device map, entry '': unknown device 'z'. Devices here: a, b, c"),
        ({"disk": 1, "b": 1}, r"'disk' offload is for inference only"),
    ],
)
def test_shares_that_make_no_sense_are_refused(value: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan_of({"": value})


def test_two_names_of_one_device_are_no_replicas() -> None:
    problem = problem_of(inventory=inventory_of("cpu", "cuda:0"))
    with pytest.raises(PlacementError, match=r"on different devices, written by name; got \['cuda:0', 'cuda:0'\]"):
        plan_of({"": {"cuda": 1, 0: 1}}, problem)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"forbidden": ("b",)}, r"'0' must not use b, but the placement has it on 'b'"),
        ({"pins": {"1": "a"}}, r"'1' is pinned to 'a', but the placement has it on 'b'"),
        ({"trusted": ("a",), "private": ("2",)}, r"needs a trusted device \(a\), but the placement has it on 'b'"),
        ({"together": (("0", "2"),)}, r"'0', '2' must stand together, but the placement has them on 'b' and 'a'"),
    ],
)
def test_constraints_hold_for_every_replica(rules: dict[str, Any], message: str) -> None:
    shares = {"a": 3, "b": 1}
    device_map: dict[str, Any] = {"2": "a", "": shares} if "together" in rules else {"": shares}
    with pytest.raises(PlacementError, match=message):
        plan_of(device_map, problem_of(constraints=Constraints(**rules)))


def test_constraints_that_replicas_keep() -> None:
    rules = Constraints(forbidden=("c",), trusted=("a", "b"), private=("0",), together=(("0", "2"),))
    assert plan_of({"": {"a": 3, "b": 1}}, problem_of(constraints=rules)).stages[0].shares == BOTH


def test_replicas_have_to_fit() -> None:
    for limit, fits in ((3 * 880, True), (2000, False)):
        problem = problem_of(inventory=inventory_of("a", "b", "c", b=limit))
        plan = plan_of({"": {"a": 3, "b": 1}}, problem)
        if fits:
            check_plan(plan, problem.graph)
            continue
        with pytest.raises(InfeasiblePlanError, match=r"needs 2.58 KiB on 'b', which has 1.95 KiB"):
            check_plan(plan, problem.graph)


def test_the_rest_may_be_left_to_auto() -> None:
    inventory = inventory_of("a", "b", "c", memory=3 * 1760)
    plan = plan_of({"0": {"b": 1, "c": 1}, "": "auto"}, problem_of(chain(5), inventory=inventory))
    assert plan.device_of["0"] == "b"
    assert [share.device for share in plan.stages[0].shares] == ["b", "c"]
    assert set(plan.shares_of) == {"0"}
    assert plan.notes[0] == "1 of 5 units are placed by hand."
    assert plan.execution.micro_batches == 4
    assert not plan.alternatives
    assert make_plans(ManualPolicy({"0": {"b": 1, "c": 1}, "": "auto"}), problem_of(chain(5))) == (
        plan_of({"0": {"b": 1, "c": 1}, "": "auto"}, problem_of(chain(5))),
    )


def tied() -> nn.Module:
    model = chain(3)
    model[2].weight = model[0].weight
    return model


def test_tied_units_go_where_the_named_one_goes_with_its_replicas() -> None:
    plan = plan_of({"0": {"a": 3, "b": 1}, "": "c"}, problem_of(tied()))
    assert plan.shares_of == {"0": BOTH, "2": BOTH}
    plan = plan_of({"0": "c", "": {"a": 3, "b": 1}}, problem_of(tied()))
    assert plan.device_of == {"0": "c", "1": "a", "2": "c"}
    assert plan.shares_of == {"1": BOTH}


def test_tied_units_may_have_replicas_of_their_own_if_one_device_owns_the_parameter() -> None:
    plan = plan_of({"0": "a", "2": {"a": 3, "b": 1}, "": "c"}, problem_of(tied()))
    assert plan.shares_of == {"2": BOTH}
    with pytest.raises(PlacementError, match=r"'0' on 'b' and '2' on 'a' share a parameter, so they must stand on one"):
        plan_of({"0": "b", "2": {"a": 3, "b": 1}, "": "c"}, problem_of(tied()))
