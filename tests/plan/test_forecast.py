"""The part of a plan that says what it will take: JSON, schema, explanation, and the check of memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import InfeasiblePlanError, PlanFileError, ScheduleError
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.plan import (
    Alternative,
    DeviceForecast,
    Execution,
    Forecast,
    Plan,
    build_plan,
    check_plan,
    explain,
)
from lightning_hetero.plan.schema import PLAN_SCHEMA
from lightning_hetero.testing.inventories import inventory_of

GRAPH = ModelGraph(
    units=(
        Unit(name="a", kind="L", parameters=1, parameter_bytes=1024, trainable_bytes=1024, buffer_bytes=0, tied_to="a"),
    )
)
MIB = 1 << 20


def plan_of(memory_bytes: int, execution: Execution | None = None, **options: Any) -> Plan:
    device = DeviceForecast(device="x", busy_s=0.75, transfer_s=0.01, memory_bytes=memory_bytes, limit_bytes=MIB)
    forecast = Forecast(step_s=1.0, devices=(device,), bottleneck="compute of x", estimated=False)
    return build_plan(
        GRAPH,
        inventory_of("x", memory=MIB),
        {"a": "x"},
        policy="test",
        execution=execution,
        forecast=forecast,
        **options,
    )


PLAN = plan_of(
    4096,
    Execution(micro_batches=4, schedule="forward", rematerialize=True),
    proof="1 s, proved optimal",
    alternatives=(
        Alternative(policy="even", step_s=2.0, reason="x waits"),
        Alternative(policy="single", step_s=None, reason="1 MiB too much"),
    ),
    seed=3,
)


@settings(deadline=None)
@given(
    st.floats(0, 1e9),
    st.integers(0, 1 << 50),
    st.text(),
    st.integers(1, 99),
    st.booleans(),
    st.none() | st.floats(0, 9),
)
def test_a_forecast_survives_json(
    seconds: float, size: int, text: str, micro_batches: int, again: bool, alternative_s: float | None
) -> None:
    device = DeviceForecast(device=text, busy_s=seconds, transfer_s=seconds, memory_bytes=size, limit_bytes=size)
    plan = replace(
        PLAN,
        execution=Execution(micro_batches=micro_batches, schedule="forward", rematerialize=again),
        forecast=Forecast(step_s=seconds, devices=(device,), bottleneck=text, estimated=again),
        alternatives=(Alternative(policy=text, step_s=alternative_s, reason=text),),
        proof=text,
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_plans_of_earlier_releases_are_read() -> None:
    later = ("execution", "forecast", "proof", "alternatives", "objective", "seed")
    old = {name: value for name, value in PLAN.to_dict().items() if name not in later}
    plan = Plan.from_dict(json.loads(json.dumps(old)))
    assert (plan.execution, plan.forecast, plan.proof, plan.alternatives) == (Execution(), None, "", ())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "3", r"damaged: TypeError: expected a whole number >= 0 below 2\^63, got '3'"),
        ("proof", 1, "damaged: TypeError: expected a text, got 1"),
        ("training", "no", "damaged: TypeError: expected true or false, got 'no'"),
        ("alternatives", {}, "damaged: TypeError: expected a list, got {}"),
        ("execution", {"micro_batches": 1}, "damaged: KeyError: 'schedule'"),
        ("execution", {"micro_batches": 0, "schedule": "whole", "rematerialize": False}, "at least 1 micro-batch"),
        ("forecast", {"step": 1}, "damaged: TypeError: a Forecast has no field 'step'"),
    ],
)
def test_new_fields_are_read_strictly(name: str, value: object, message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        Plan.from_dict({**PLAN.to_dict(), name: value})


def test_an_execution_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ScheduleError, match="schedule 'whole' runs a batch in one piece, so it has 1 micro-batch"):
        Execution(micro_batches=2)
    with pytest.raises(ScheduleError, match="schedule '1f1b' keeps its activations; rematerialize needs"):
        Execution(micro_batches=2, schedule="1f1b", rematerialize=True)


def conforms(value: object, schema: dict[str, Any]) -> bool:
    """The keywords of JSON Schema that the schema of plans uses."""
    if "$ref" in schema:
        return conforms(value, PLAN_SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "const" in schema:
        return bool(value == schema["const"])
    if "anyOf" in schema:
        return any(conforms(value, part) for part in schema["anyOf"])
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kind = schema["type"]
    if kind in ("integer", "number"):
        fits = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
        return fits and value >= schema["minimum"]  # type: ignore[operator]
    if not isinstance(value, kinds[kind]):
        return False
    if isinstance(value, dict):
        known = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(known) and all(
            conforms(item, known[name]) for name, item in value.items()
        )
    if isinstance(value, list) and "prefixItems" in schema:
        return all(conforms(item, part) for item, part in zip(value, schema["prefixItems"], strict=True))
    return not isinstance(value, list) or all(conforms(item, schema["items"]) for item in value)


def test_the_schema_describes_what_is_written_and_nothing_else() -> None:
    data = json.loads(PLAN.to_json())
    assert conforms(data, PLAN_SCHEMA)
    assert not conforms({**data, "surprise": 1}, PLAN_SCHEMA)
    assert not conforms({**data, "seed": "3"}, PLAN_SCHEMA)
    assert not conforms({**data, "forecast": {"step_s": 1}}, PLAN_SCHEMA)
    assert PLAN_SCHEMA["properties"]["proof"]["description"] == "What is known about how good the plan is, in words."


def test_the_explanation_shows_the_forecast_and_what_was_rejected() -> None:
    text = explain(PLAN)
    assert (
        "Predicted: 1.00 s a step (4 micro-batches, schedule 'forward', forwards repeated in the backward), "
        "bound by compute of x (peak memory: activations included)" in text
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["x", "750", "ms", "25", "%", "10.0", "ms", "4.00", "KiB", "1.00", "MiB", "0", "%"] in rows
    assert ["even", "2.00", "s", "x", "waits"] in rows
    assert "single  does not fit  1 MiB too much" in text
    assert "1 s, proved optimal" in text


@pytest.mark.parametrize(
    ("execution", "way"),
    [
        (Execution(), "Try: micro_batches=4 with rematerialize=True, which keeps activations of a part of the batch"),
        (Execution(micro_batches=2, schedule="forward"), "Try: rematerialize=True, which keeps"),
        (Execution(micro_batches=2, schedule="gpipe"), "Try: schedule='1f1b', which keeps"),
        (Execution(micro_batches=2, schedule="1f1b"), r"Try: more micro-batches \(now 2\), which makes"),
    ],
)
def test_activations_that_do_not_fit_are_refused_with_ways_out(execution: Execution, way: str) -> None:
    plan = plan_of(2 * MIB, execution, optimizer_factor=2.0)
    with pytest.raises(InfeasiblePlanError, match=way) as caught:
        check_plan(plan, GRAPH)
    assert "needs 2.00 MiB on 'x' at its peak, which has 1.00 MiB" in str(caught.value)
    assert "1.00 MiB too much" in str(caught.value)
    check_plan(plan_of(MIB, execution), GRAPH)
