"""Plans for exported models: devices that cannot train, units that they refuse, and streams of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from lightning_hetero.devices import Inventory
from lightning_hetero.errors import PlacementError
from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.placement.exact import ExactPolicy
from lightning_hetero.placement.judge import Judge
from lightning_hetero.placement.objective import stream_s
from lightning_hetero.plan import Plan, check_plan

Measured = Callable[..., Problem]
POLICIES = ["auto", "measured", "even", "memory_first", "proportional", "exact", "dag", "heft", "interleaved", "hybrid"]
WORK_S = [0.002, 0.001, 0.004, 0.001, 0.003, 0.002]


def deployed(measured: Measured, speeds: list[float], **options: Any) -> Problem:
    """Six units on `dev:0`, which can train, and others, which cannot."""
    options = {"training": False, "optimizer_factor": 0.0, "schedules": ("whole",), "deployment": True, **options}
    problem = measured(WORK_S, speeds, **{**options, "training": False, "deployment": False})
    first, *others = problem.inventory.devices
    others = [replace(device, trainable=False, torch_device=None) for device in others]
    inventory = Inventory(devices=(first, *others), links=problem.inventory.links)
    return replace(problem, inventory=inventory, deployment=options["deployment"])


def plan_of(name: str, problem: Problem) -> Plan:
    plan = make_plan(get_policy(name), problem)
    check_plan(plan, problem.graph)
    return plan


def least_stream_s(problem: Problem) -> float:
    """Of all placements."""
    judge = Judge(problem)
    ways = judge.executions
    assert len(ways) == 1
    return min(judge.price(homes, ways[0]).value for homes in product(judge.names, repeat=len(judge.pieces)))


def test_a_device_that_cannot_train_is_used_in_a_deployment_only(measured: Measured) -> None:
    fast = [1.0, 10.0]
    assert {*plan_of("auto", deployed(measured, fast)).device_of.values()} == {"dev:1"}
    assert {*plan_of("auto", deployed(measured, fast, deployment=False)).device_of.values()} == {"dev:0"}


@pytest.mark.parametrize("objective", ["latency", "throughput", "peak_memory"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_unit_that_a_device_refuses_stands_elsewhere_and_the_plan_says_why(
    measured: Measured, name: str, objective: str
) -> None:
    refused = {"dev:1": dict.fromkeys(("u.1", "u.4"), "has no gelu"), "dev:2": {"u.1": "has no erf"}}
    plan = plan_of(name, deployed(measured, [1.0, 8.0, 8.0], refused=refused, objective=objective))

    assert plan.device_of["u.1"] == "dev:0"
    assert plan.device_of["u.4"] in ("dev:0", "dev:2")
    assert not plan.shares_of
    assert "dev:1 does not take 'u.1', 'u.4': it has no gelu." in plan.notes
    assert "dev:2 does not take 'u.1': it has no erf." in plan.notes


@pytest.mark.parametrize("name", [*POLICIES, "single", "replicate"])
def test_a_device_that_refuses_everything_is_left_out(measured: Measured, name: str) -> None:
    problem = deployed(measured, [1.0, 8.0])
    refused = {"dev:1": dict.fromkeys(problem.graph.names, "computes in int8 and not in float32")}
    plan = plan_of(name, replace(problem, refused=refused))

    assert {*plan.device_of.values()} == {"dev:0"}
    assert "dev:1 takes no unit: it computes in int8 and not in float32." in plan.notes


def test_a_unit_that_nothing_takes_is_refused_with_all_reasons(measured: Measured) -> None:
    refused = {"dev:0": {"u.1": "has no erf"}, "dev:1": {"u.1": "has no gelu"}}
    with pytest.raises(
        PlacementError,
        match=r"^no device is left for 'u\.1': 'u\.1' cannot stand on dev:0, which has no erf; "
        r"'u\.1' cannot stand on dev:1, which has no gelu\. Devices that units may use: dev:0, dev:1\.",
    ):
        plan_of("auto", deployed(measured, [1.0, 8.0], refused=refused))


def test_one_batch_stays_on_the_fastest_device_and_a_stream_uses_all(measured: Measured) -> None:
    speeds = [1.0, 1.0, 1.0]
    latency = plan_of("auto", deployed(measured, speeds, objective="latency"))
    stream = plan_of("auto", deployed(measured, speeds, objective="throughput"))

    assert len(latency.used) == 1
    assert len(stream.used) == 3
    assert latency.forecast is not None
    assert stream.forecast is not None
    assert stream_s(stream.forecast) < 0.5 * latency.forecast.step_s <= 0.5 * stream.forecast.step_s
    (note,) = [note for note in stream.notes if note.startswith("In a stream")]
    assert note.startswith("In a stream, a batch of 16 rows leaves every ")
    assert not [note for note in latency.notes if note.startswith("In a stream")]


@pytest.mark.parametrize("speeds", [[1.0, 2.0], [1.0, 3.0, 0.5], [2.0, 1.0, 1.0]])
@pytest.mark.parametrize("latency_s", [0.0, 1e-3])
def test_the_best_stream_is_found(measured: Measured, speeds: list[float], latency_s: float) -> None:
    problem = deployed(measured, speeds, objective="throughput", latency_s=latency_s)
    least_s = least_stream_s(problem)
    plan = make_plan(ExactPolicy(), problem)
    assert plan.forecast is not None
    assert stream_s(plan.forecast) == pytest.approx(least_s)
    auto = plan_of("auto", problem)
    assert auto.forecast is not None
    assert stream_s(auto.forecast) <= least_s * 1.04  # what one device alone may be behind


def test_the_chain_solver_is_asked_for_the_stream(measured: Measured) -> None:
    problem = deployed(measured, [1.0, 1.0, 1.0], objective="throughput", bytes_per_s=1e12)
    solved = make_plan(ExactPolicy(one_by_one=0, tries=0), problem)

    assert solved.forecast is not None
    assert stream_s(solved.forecast) == pytest.approx(0.004 + 0.001, rel=1e-3)  # 2 1 | 4 1 | 3 2
    assert solved.proof.startswith("max load of the chain (whole): 0.005")


def test_what_is_trained_is_no_deployment(measured: Measured) -> None:
    with pytest.raises(PlacementError, match=r"^a model that is trained cannot be planned as a deployment, where"):
        measured(WORK_S, [1.0], deployment=True)
