"""What holds for every built-in schedule: the checker accepts it, its text is read back, its bound is kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.schedule import (
    Action,
    Interleaved1F1B,
    OneFOneB,
    Op,
    Pipeline,
    Programs,
    Schedule,
    Timeline,
    ZeroBubble,
    bounds,
    check_program,
    format_programs,
    get_schedule,
    make_programs,
    parse_programs,
    schedule_names,
)

Obey = Callable[[Programs, Pipeline, Callable[[Action], float]], Timeline]

OPS: tuple[tuple[Op, ...], ...] = (("F", "B"), ("F", "I", "W"), ("F",), ("B",), ("I", "W"))
DEALS = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)  # the device of each stage
PIPELINES = st.builds(Pipeline, device_of=DEALS, micro_batches=st.integers(1, 8), ops=st.sampled_from(OPS))
SCHEDULES = (
    st.sampled_from(schedule_names()).map(get_schedule)
    | st.builds(OneFOneB, spare=st.integers(0, 3))
    | st.builds(Interleaved1F1B, spare=st.integers(0, 3))
    | st.builds(ZeroBubble, spare=st.integers(0, 3))
)


@settings(deadline=None)
@given(schedule=SCHEDULES, pipeline=PIPELINES)
def test_the_checker_accepts_it_with_its_own_bound(schedule: Schedule, pipeline: Pipeline) -> None:
    check_program(make_programs(schedule, pipeline), pipeline, in_flight=bounds(schedule, pipeline))


@settings(deadline=None)
@given(schedule=SCHEDULES, pipeline=PIPELINES, data=st.data())
def test_devices_of_any_speed_can_obey_it(
    obey: Obey, schedule: Schedule, pipeline: Pipeline, data: st.DataObject
) -> None:
    number = pipeline.stages * len(pipeline.ops)
    speeds = data.draw(st.lists(st.integers(0, 9), min_size=number, max_size=number))

    def seconds(action: Action) -> float:
        return float(speeds[action.stage * len(pipeline.ops) + pipeline.ops.index(action.op)])

    timeline = obey(make_programs(schedule, pipeline), pipeline, seconds)
    assert len(timeline.spans) == len([*pipeline.actions()])
    assert timeline.makespan_s >= max(timeline.busy_s.values())


@settings(deadline=None)
@given(schedule=SCHEDULES, pipeline=PIPELINES)
def test_its_text_is_read_back(schedule: Schedule, pipeline: Pipeline) -> None:
    programs = make_programs(schedule, pipeline)
    unused = dict.fromkeys(range(max(pipeline.devices)), ())
    assert parse_programs(format_programs(programs)) == {**unused, **programs}


@pytest.mark.parametrize("name", schedule_names())
@settings(deadline=None)
@given(micro_batches=st.integers(1, 8))
def test_on_one_device_it_needs_no_second_one(name: str, micro_batches: int) -> None:
    schedule = get_schedule(name)
    programs = make_programs(schedule, Pipeline(device_of=(0,), micro_batches=micro_batches))
    assert len(programs[0]) == 2 * micro_batches


@settings(deadline=None)
@given(stages=st.integers(1, 6), micro_batches=st.integers(1, 12), spare=st.integers(0, 3))
def test_1f1b_holds_no_more_micro_batches_than_stages_remain_and_the_spare_ones(
    stages: int, micro_batches: int, spare: int
) -> None:
    pipeline = Pipeline(device_of=tuple(range(stages)), micro_batches=micro_batches)
    for stage, program in make_programs(OneFOneB(spare=spare), pipeline).items():
        held = max(accumulate(1 if action.op == "F" else -1 for action in program))
        assert held <= min(stages - stage + spare, micro_batches)
        assert held >= min(stages - stage, micro_batches)


@settings(deadline=None)
@given(stages=st.integers(1, 6), micro_batches=st.integers(1, 12))
def test_by_default_1f1b_has_one_micro_batch_more_in_flight_than_there_are_stages(
    stages: int, micro_batches: int
) -> None:
    pipeline = Pipeline(device_of=tuple(range(stages)), micro_batches=micro_batches)
    assert bounds(get_schedule("1f1b"), pipeline)[0] == min(stages + 1, micro_batches)
