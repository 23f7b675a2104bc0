"""What plans say of each stage: seconds, what it keeps, and what it sends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lightning_hetero.errors import PlanFileError
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.plan import Plan, StageForecast, explain

Measured = Callable[..., Problem]
HALVES = {"u.0": "dev:0", "u.1": "dev:0", "u.2": "dev:1", "u.3": "dev:1"}
ROWS = 16


def planned(measured: Measured, device_of: dict[str, Any] | None = None, **options: Any) -> Plan:
    """Four units of a second each, two on a device of speed 1, two on one of speed 2."""
    problem = measured([1.0] * 4, [1.0, 2.0], rows=ROWS, **options)
    return make_plan(ManualPolicy(device_of or HALVES), problem)


def stages_of(plan: Plan) -> tuple[StageForecast, ...]:
    assert plan.forecast is not None
    return plan.forecast.stages


def seconds_of(stage: StageForecast) -> tuple[float, float]:
    return stage.forward_s, stage.backward_s


@pytest.mark.parametrize(
    "options",
    [
        {"schedules": ("whole",)},
        {"schedules": ("forward",), "micro_batches": 4},
        {"schedules": ("1f1b",), "micro_batches": 4},
    ],
    ids=lambda options: options["schedules"][0],
)
def test_seconds_of_stages_are_those_of_their_units_however_a_batch_is_cut(
    measured: Measured, options: dict[str, Any]
) -> None:
    first, second = stages_of(planned(measured, **options))
    assert (first.stage, first.device, second.stage, second.device) == (0, "dev:0", 1, "dev:1")
    assert seconds_of(first) == pytest.approx((2.0, 4.0))
    assert seconds_of(second) == pytest.approx((1.0, 2.0))
    assert (first.sent_bytes, second.sent_bytes) == (4 * ROWS, 4 * ROWS)  # to each other, and to the loss on the root


def test_repeated_forwards_count_as_backward(measured: Measured) -> None:
    first, second = stages_of(planned(measured, rematerialize=True, schedules=("forward",), micro_batches=4))
    assert seconds_of(first) == pytest.approx((2.0, 2.0 + 4.0))
    assert seconds_of(second) == pytest.approx((1.0, 1.0 + 2.0))


def test_what_a_stage_keeps_is_its_activations_and_inputs(measured: Measured) -> None:
    first, second = stages_of(planned(measured, saved_bytes=100.0, schedules=("whole",)))
    # Two units with one input of 4 bytes a row each; what the stages hand on is kept by who takes it.
    assert (first.kept_bytes, second.kept_bytes) == (2 * (100 + 4) * ROWS, 2 * (100 + 4) * ROWS)


def test_a_pipeline_keeps_fewer_micro_batches_than_a_whole_batch_has(measured: Measured) -> None:
    options: dict[str, Any] = {"saved_bytes": 1000.0, "micro_batches": 16}
    gpipe, one_forward_one_backward = (
        stages_of(planned(measured, schedules=(schedule,), **options)) for schedule in ("gpipe", "1f1b")
    )
    assert all(stage.kept_bytes >= 2 * 1000 * ROWS for stage in gpipe)
    assert all(stage.kept_bytes < 2 * 1000 * ROWS / 2 for stage in one_forward_one_backward)


def test_without_training_there_is_no_backward_and_nothing_is_kept(measured: Measured) -> None:
    for stage in stages_of(planned(measured, training=False)):
        assert stage.forward_s > 0
        assert (stage.backward_s, stage.kept_bytes) == (0, 0)


def test_replicas_have_a_row_each_and_share_the_work(measured: Measured) -> None:
    plan = planned(measured, {"": {"dev:0": 1, "dev:1": 3}})
    owner, replica = stages_of(plan)
    assert (owner.stage, owner.device, replica.stage, replica.device) == (0, "dev:0", 0, "dev:1")
    assert owner.forward_s == pytest.approx(4.0 / 4)
    assert replica.forward_s == pytest.approx(4.0 * 3 / 4 / 2)


def test_stages_take_as_long_as_their_devices_compute(measured: Measured) -> None:
    plan = planned(measured, overhead_s=0.01, micro_batches=4, schedules=("forward",))
    assert plan.forecast is not None
    for device, stage in zip(plan.forecast.devices, plan.forecast.stages, strict=True):
        assert stage.forward_s + stage.backward_s == pytest.approx(device.busy_s)


def test_the_explanation_shows_each_stage(measured: Measured) -> None:
    text = explain(planned(measured, schedules=("whole",)))
    rows = [line.split() for line in text.splitlines()]
    assert ["stage", "on", "forward", "backward", "keeps", "sends", "on"] in rows
    assert ["1", "dev:1", "1.00", "s", "2.00", "s", "448", "B", "64", "B"] in rows


def test_plan_files_keep_the_stages_and_those_without_are_read(measured: Measured) -> None:
    plan = planned(measured)
    assert Plan.from_json(plan.to_json()) == plan
    old = json.loads(plan.to_json())
    del old["forecast"]["stages"]
    assert plan.forecast is not None
    assert Plan.from_dict(old) == replace(plan, forecast=replace(plan.forecast, stages=()))
    old["forecast"]["stages"] = [{"stage": 0}]
    with pytest.raises(PlanFileError, match="damaged: KeyError: 'device'"):
        Plan.from_dict(old)
