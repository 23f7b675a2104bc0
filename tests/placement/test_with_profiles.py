"""What every policy promises once it is known what the model costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import HeteroError, InfeasiblePlanError, PlacementError
from lightning_hetero.placement import (
    AutoPolicy,
    Constraints,
    ManualPolicy,
    PlacementPolicy,
    Problem,
    check_constraints,
    get_policy,
    make_plan,
)
from lightning_hetero.placement.executions import executions
from lightning_hetero.placement.replicas import places_of
from lightning_hetero.plan import Execution, Plan, Share, check_plan
from lightning_hetero.schedule import schedule_names
from lightning_hetero.simulate import Costs, Prediction, predict

SEARCHES = ["proportional", "exact", "dag", "heft", "interleaved"]
FIXED = ["even", "memory_first", *SEARCHES]
POLICIES = ["auto", "measured", "single", *FIXED, "map"]
Measured = Callable[..., Problem]


def policy_named(name: str) -> PlacementPolicy:
    return ManualPolicy({"u.0": "dev:0", "": "auto"}) if name == "map" else get_policy(name)


def predicted(
    problem: Problem,
    device_of: dict[str, str],
    execution: Execution,
    shares_of: dict[str, tuple[Share, ...]] | None = None,
) -> Prediction:
    assert problem.profile is not None
    costs = Costs(problem.graph, problem.inventory, problem.profile, problem.training, problem.optimizer_factor)
    return predict(costs, device_of, execution, shares_of)


@st.composite
def constraints(draw: st.DrawFn, units: int, devices: int) -> Constraints:
    """Mostly few rules, that may or may not contradict each other."""
    unit, device = st.integers(0, units - 1).map("u.{}".format), st.integers(0, devices - 1).map("dev:{}".format)
    trusted = draw(st.none() | st.lists(device, max_size=1).map(lambda more: ("dev:0", *more)))
    return Constraints(
        pins=draw(st.dictionaries(unit, device, max_size=1)),
        together=tuple(draw(st.lists(st.tuples(unit, unit), max_size=1))),
        forbidden=tuple(draw(st.lists(device.filter(lambda name: name != "dev:0"), max_size=1))),
        trusted=trusted,
        private=tuple(draw(st.lists(unit, max_size=1))) if trusted else (),
    )


@st.composite
def settings_of_problems(draw: st.DrawFn, constrained: bool = True) -> dict[str, Any]:
    """Arguments of `measured_problem`: up to five units on up to three unequal devices."""
    count, devices = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    pair = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda ends: ends[0] + 1 < ends[1])
    need = 1600 * count  # of all units, in training with Adam
    return {
        "work_s": draw(st.lists(st.sampled_from([0.001, 0.002, 0.01]), min_size=count, max_size=count)),
        "speeds": draw(st.lists(st.sampled_from([0.2, 1.0, 3.0]), min_size=devices, max_size=devices)),
        "memory": draw(st.lists(st.integers(need // 3, 3 * need), min_size=devices, max_size=devices)),
        "rows": draw(st.sampled_from([1, 6, 16])),
        "row_bytes": tuple(draw(st.lists(st.sampled_from([4.0, 40.0]), min_size=1, max_size=3))),
        "chained": draw(st.booleans()),
        "skips": draw(st.lists(pair, max_size=2)) if count > 2 else (),
        "overhead_s": draw(st.sampled_from([0.0, 0.0005])),
        "bytes_per_s": draw(st.sampled_from([1e5, 1e9])),
        "optimizer_s_per_byte": draw(st.sampled_from([0.0, 1e-7])),
        "training": draw(st.booleans()),
        "micro_batches": draw(st.sampled_from([None, None, 1, 3])),
        "schedules": draw(st.sampled_from([("whole", "forward"), ("forward",), ("1f1b", "interleaved_1f1b", "whole")])),
        "rematerialize": draw(st.sampled_from([None, False, True])),
        "objective": draw(st.sampled_from(["step_time", "step_time", "latency", "throughput", "peak_memory"])),
        "constraints": draw(constraints(count, devices)) if constrained else Constraints(),
    }


def some_placement_is_allowed(problem: Problem) -> bool:
    names = [device.name for device in problem.inventory]
    for homes in product(names, repeat=len(problem.graph.units)):
        try:
            check_constraints(dict(zip(problem.graph.names, homes, strict=True)), problem)
        except PlacementError:
            continue
        return True
    return False


REMATERIALIZED = {
    "work_s": [0.001, 0.001, 0.001],
    "speeds": [0.2, 0.2, 0.2],
    "memory": [1600, 2508, 5016],
    "rows": 6,
    "row_bytes": (4.0,),
    "chained": False,
    "skips": [],
    "overhead_s": 0.0005,
    "bytes_per_s": 1e5,
    "optimizer_s_per_byte": 0.0,
    "training": True,
    "micro_batches": None,
    "schedules": ("whole", "forward"),
    "rematerialize": True,
    "objective": "step_time",
    "constraints": Constraints(),
}
"""Several micro-batches whose forwards, with the runtime's overhead, run again in the backward."""


@pytest.mark.parametrize("name", POLICIES)
@given(arguments=settings_of_problems())
@example(arguments=REMATERIALIZED)
@settings(max_examples=60, deadline=None)
def test_a_plan_fits_and_respects_all_constraints(measured: Measured, name: str, arguments: dict[str, Any]) -> None:
    problem = measured(**arguments)
    try:
        plan = make_plan(policy_named(name), problem)
    except InfeasiblePlanError:
        return
    except PlacementError:
        assert name in ("single", "map") or not some_placement_is_allowed(problem)
        return
    check_plan(plan, problem.graph)
    for device_of in places_of(plan.device_of, plan.shares_of):
        check_constraints(device_of, problem)
    prediction = predicted(problem, plan.device_of, plan.execution, plan.shares_of)
    assert prediction.fits
    assert plan.forecast is not None
    assert replace(plan.forecast, stages=()) == prediction.forecast
    for device in prediction.timeline.devices:
        work = prediction.timeline.work_of(device)
        computed_s = sum(span.duration_s for span in work if span.stage is not None)
        stages = [stage for stage in plan.forecast.stages if stage.device == device]
        work_s = sum(stage.forward_s + stage.backward_s for stage in stages)
        if plan.execution.schedule in ("whole", "forward"):
            assert work_s == pytest.approx(computed_s)
        else:  # there, what the ends of the pipeline exchange with the root is a part of their work
            assert work_s <= computed_s * (1 + 1e-9)
    assert plan.objective == problem.objective
    allowed = executions(problem, problem.profile.rows if problem.profile else 1)
    if plan.shares_of:
        assert problem.micro_batches in (None, plan.execution.micro_batches)
        assert plan.execution.schedule == "forward"
        assert "forward" in problem.schedules
        return
    assert plan.execution in allowed or (len(plan.used) == 1 and plan.execution == Execution())


@pytest.mark.parametrize("name", SEARCHES)
@given(arguments=settings_of_problems())
@settings(max_examples=30, deadline=None)
def test_what_fits_on_one_device_is_never_refused(measured: Measured, name: str, arguments: dict[str, Any]) -> None:
    problem = measured(**arguments)
    try:
        make_plan(get_policy("single"), problem)
    except HeteroError:
        return
    make_plan(get_policy(name), problem)


@pytest.mark.parametrize("name", POLICIES)
@given(arguments=settings_of_problems(constrained=False))
@settings(max_examples=10, deadline=None)
def test_the_same_problem_gets_the_same_plan(measured: Measured, name: str, arguments: dict[str, Any]) -> None:
    plans = []
    for _ in range(2):
        try:
            plans.append(make_plan(policy_named(name), measured(**arguments)).to_json())
        except InfeasiblePlanError as error:
            plans.append(str(error))
    assert plans[0] == plans[1]


@given(arguments=settings_of_problems())
@settings(max_examples=60, deadline=None)
def test_auto_is_never_predicted_to_be_worse_than_anything_else(measured: Measured, arguments: dict[str, Any]) -> None:
    problem = measured(**(arguments | {"objective": "step_time"}))
    seconds: dict[str, float] = {}
    for name in ("auto", "single", *FIXED):
        try:
            plan = make_plan(get_policy(name), problem)
        except HeteroError:
            continue
        assert plan.forecast is not None
        seconds[name] = plan.forecast.step_s
    if seconds:
        assert "auto" in seconds
        assert seconds["auto"] <= seconds.get("single", float("inf"))
        assert seconds["auto"] <= min(seconds.values()) / (1 - AutoPolicy().least_gain) * (1 + 1e-12)


@given(arguments=settings_of_problems(constrained=False))
@settings(max_examples=60, deadline=None)
def test_auto_refuses_only_what_fits_in_no_way(measured: Measured, arguments: dict[str, Any]) -> None:
    problem = measured(**arguments)
    names = [device.name for device in problem.inventory]
    ways = (Execution(), *executions(problem, arguments["rows"]))
    assume(len(names) ** len(problem.graph.units) * len(ways) <= 2000)  # as many as `auto` looks at one by one
    try:
        make_plan(get_policy("auto"), problem)
    except InfeasiblePlanError:
        for homes in product(names, repeat=len(problem.graph.units)):
            device_of = dict(zip(problem.graph.names, homes, strict=True))
            allowed = ways[1:] if len(set(homes)) > 1 or "whole" not in problem.schedules else ways
            assert not any(predicted(problem, device_of, way).fits for way in allowed)


@pytest.mark.parametrize("schedule", schedule_names())
def test_every_schedule_may_be_asked_for(measured: Measured, schedule: str) -> None:
    problem = measured([0.002] * 6, [1.0, 0.7], schedules=(schedule,), overhead_s=1e-5)
    for name in ("auto", "exact", "interleaved"):
        plan = make_plan(get_policy(name), problem)
        assert plan.execution.schedule == schedule


def uneven(measured: Measured, **options: Any) -> Problem:
    return measured([0.004, 0.002, 0.003, 0.004, 0.001, 0.002] * 2, [1.0, 0.5, 0.01], overhead_s=1e-5, **options)


def test_auto_spreads_where_that_is_clearly_faster_and_says_what_it_left_idle(measured: Measured) -> None:
    plan = make_plan(get_policy("auto"), uneven(measured))
    assert [device.name for device in plan.used] == ["dev:0", "dev:1"]
    assert plan.execution.micro_batches > 1
    assert any(note.startswith("It saves ") and "the best single device" in note for note in plan.notes)
    assert any(note.startswith("dev:2 stays idle: using it would cost +") for note in plan.notes)
    rejected = {alternative.policy: alternative for alternative in plan.alternatives}
    assert {"single (dev:0)", "single (dev:1)", "single (dev:2)"} <= set(rejected)
    assert plan.forecast is not None
    assert all((a.step_s or 0) >= plan.forecast.step_s for a in plan.alternatives)
    assert rejected["single (dev:0)"].reason.startswith("+")
    assert Plan.from_json(plan.to_json()) == plan


def test_auto_stays_on_one_device_for_a_gain_that_may_be_none(measured: Measured) -> None:
    problem = measured([0.004] * 6, [1.0, 0.2], overhead_s=1e-5, launch_s=1e-4, parameter_bytes=10**6, bytes_per_s=1e8)
    careful, eager = make_plan(AutoPolicy(), problem), make_plan(AutoPolicy(least_gain=0.0), problem)
    assert careful.forecast is not None
    assert eager.forecast is not None
    assert len(eager.used) == 2
    assert 0 < 1 - eager.forecast.step_s / careful.forecast.step_s < 0.03
    assert [device.name for device in careful.used] == ["dev:0"]
    assert careful.execution == Execution()
    assert careful.notes[0].startswith("Everything stands on dev:0: of ")
    assert careful.notes[0].endswith("judged by seconds of a step, none over several devices saves 3.0 %.")
    assert any(
        "dev:1 stays idle: using it would save" in note and "less than the 3.0 %" in note for note in careful.notes
    )


def test_single_takes_the_fastest_device_that_holds_the_model(measured: Measured) -> None:
    problem = measured([0.001] * 4, [1.0, 2.0, 3.0], memory=[1 << 20, 1 << 20, 5000])
    assert [device.name for device in make_plan(get_policy("single"), problem).used] == ["dev:1"]


def test_proportional_gives_a_device_as_much_work_as_it_is_fast(measured: Measured) -> None:
    problem = measured([0.001] * 12, [3.0, 2.0, 1.0], schedules=("forward",), micro_batches=4)
    plan = make_plan(get_policy("proportional"), problem)
    assert [(stage.device, len(stage.units)) for stage in plan.stages] == [("dev:0", 6), ("dev:1", 4), ("dev:2", 2)]


def test_proportional_moves_units_until_all_fit(measured: Measured) -> None:
    problem = measured([0.001] * 12, [3.0, 2.0, 1.0], memory=[9000, 1 << 20, 1 << 20], schedules=("forward",))
    plan = make_plan(get_policy("proportional"), problem)
    assert 0 < sum(len(stage.units) for stage in plan.stages if stage.device == "dev:0") < 6


@pytest.mark.parametrize(
    ("schedules", "expected"), [(("forward",), "forward"), (("forward", "interleaved_1f1b"), "interleaved_1f1b")]
)
def test_interleaved_gives_every_device_several_stages(
    measured: Measured, schedules: tuple[str, ...], expected: str
) -> None:
    problem = measured([0.001] * 8, [1.0, 1.0], schedules=schedules, micro_batches=4)
    plan = make_plan(get_policy("interleaved"), problem)
    assert [stage.device for stage in plan.stages].count("dev:0") >= 2
    assert plan.execution == Execution(micro_batches=4, schedule=expected)


def test_a_skip_over_a_slow_link_keeps_its_ends_together(measured: Measured) -> None:
    problem = measured(
        [0.01] * 6,
        [1.0, 1.0],
        chained=False,
        row_bytes=(1.0,),
        skips=[(1, 4)],
        skip_bytes=400.0,  # there and back it takes longer than half of the work
        bytes_per_s=1e5,
        micro_batches=4,
        schedules=("forward",),
    )
    plan = make_plan(get_policy("dag"), problem)
    assert plan.device_of["u.1"] == plan.device_of["u.4"]
    assert len(plan.used) == 2


def test_a_search_that_is_out_of_time_still_answers(measured: Measured) -> None:
    problem = uneven(measured, out_of_time=lambda: True)
    for name in ("auto", *SEARCHES):
        plan = make_plan(get_policy(name), problem)
        assert plan.forecast is not None


def test_peak_memory_spreads_what_time_would_keep_together(measured: Measured) -> None:
    memory = 20_000
    quick = make_plan(get_policy("auto"), measured([0.001] * 6, [1.0, 0.01], memory=memory))
    small = make_plan(get_policy("auto"), measured([0.001] * 6, [1.0, 0.01], memory=memory, objective="peak_memory"))
    assert quick.forecast is not None
    assert small.forecast is not None
    assert len(quick.used) == 1
    assert max(d.memory_bytes for d in small.forecast.devices) < max(d.memory_bytes for d in quick.forecast.devices)


def test_rows_that_depend_on_each_other_are_not_cut(measured: Measured) -> None:
    problem = measured([1.0, 1.0, 1.0, 1.0], [1.0, 1.0])
    assert problem.profile is not None
    assert make_plan(get_policy("auto"), problem).execution.schedule == "forward"

    coupled = replace(problem, profile=replace(problem.profile, coupled=("norm",)))
    for policy in ("auto", "replicate", "exact"):
        plan = make_plan(get_policy(policy), coupled)
        assert (plan.execution.schedule, plan.shares_of) == ("whole", {})
    notes = make_plan(get_policy("auto"), coupled).notes
    assert any(note.startswith("Batches are not cut: 'norm' uses the mean and variance") for note in notes), notes

    # Who asks for a number of micro-batches gets it as a wish; other modules may be cut.
    asked = make_plan(get_policy("even"), replace(coupled, micro_batches=4))
    assert (asked.execution.micro_batches, asked.execution.schedule) == (4, "forward")

    deferred = replace(coupled, defers_batch_norm=True)
    assert make_plan(get_policy("auto"), deferred).execution.schedule == "forward"


def test_what_would_be_cut_is_predicted_as_it_will_run(measured: Measured) -> None:
    problem = measured([1.0, 1.0], [1.0, 1.0])
    assert problem.profile is not None
    device_of = {"u.0": "dev:0", "u.1": "dev:1"}
    coupled = replace(problem, profile=replace(problem.profile, coupled=("norm",)))
    forward = Execution(micro_batches=4, schedule="forward")

    assert predicted(coupled, device_of, forward).forecast == predicted(problem, device_of, Execution()).forecast
    assert (
        predicted(problem, device_of, forward).forecast.step_s < predicted(coupled, device_of, forward).forecast.step_s
    )
