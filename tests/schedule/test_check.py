"""The checker: every fault has its sentence, and a drawing with an arrow at it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import (
    Action,
    OneFOneB,
    Pipeline,
    Programs,
    bounds,
    check_program,
    get_schedule,
    make_programs,
    parse_programs,
    schedule_names,
)

TWO = Pipeline(device_of=(0, 1), micro_batches=2)


def refusal(programs: Programs, pipeline: Pipeline, in_flight: tuple[int, ...] | None = None) -> str:
    with pytest.raises(ScheduleError) as refused:
        check_program(programs, pipeline, in_flight=in_flight)
    return str(refused.value)


FAULTS = {
    "a strange action": (
        "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1,1B2",
        "device 1, step 4: 1B2 is no action of this pipeline, which has 2 stages, 2 micro-batches and the ops F, B; "
        "remove it\n"
        "  device 0  0F0 0F1 0B0 0B1\n"
        "  device 1  1F0 1B0 1F1 1B1 1B2\n"
        "                            ^^^",
    ),
    "a wrong device": (
        "0F0,0F1,1F0,0B0,0B1\n1B0,1F1,1B1",
        "device 0, step 2: 1F0 belongs to device 1, which owns stage 1\n"
        "  device 0  0F0 0F1 1F0 0B0 0B1\n"
        "                    ^^^\n"
        "  device 1  1B0 1F1 1B1",
    ),
    "a double action": (
        "0F0,0F1,0B0,0F1,0B1\n1F0,1B0,1F1,1B1",
        "device 0, step 3: 0F1 is done already in step 1; remove one of them\n"
        "  device 0  0F0 0F1 0B0 0F1 0B1\n"
        "                        ^^^\n"
        "  device 1  1F0 1B0 1F1 1B1",
    ),
    "a missing action": (
        "0F0,0F1,0B0,0B1\n1F0,1B0,1F1",
        "device 1 never does 1B1; add it\n"
        "  device 0  0F0 0F1 0B0 0B1\n"
        "  device 1  1F0 1B0 1F1\n"
        "                        ^^^",
    ),
    "a missing device": (
        "0F0,0F1,0B0,0B1",
        "device 1 never does 1F0, and 3 more are missing; add it\n"
        "  device 0  0F0 0F1 0B0 0B1\n"
        "  device 1\n"
        "            ^^^",
    ),
    "a backward before its forward": (
        "0F0,0B1,0F1,0B0\n1F0,1B0,1F1,1B1",
        "device 0, step 1: 0B1 needs 0F1, which comes in step 2 only; move it behind\n"
        "  device 0  0F0 0B1 0F1 0B0\n"
        "                ^^^\n"
        "  device 1  1F0 1B0 1F1 1B1",
    ),
    "a deadlock": (
        "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1",
        "deadlock: device 0 waits in step 1 with 0B0 for 1B0 of device 1; device 1 waits in step 1 with 1F1 for 0F1 "
        "of device 0; move one of these actions behind others of its device\n"
        "  device 0  0F0 0B0 0F1 0B1\n"
        "                ^^^\n"
        "  device 1  1F0 1F1 1B0 1B1\n"
        "                ^^^",
    ),
}


@pytest.mark.parametrize(("table", "says"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_drawn(table: str, says: str) -> None:
    assert refusal(parse_programs(table), TWO) == says


def test_a_device_that_waits_for_others_in_a_circle_is_not_to_blame() -> None:
    programs = parse_programs("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n2F0,2F1,2B0,2B1")
    assert refusal(programs, Pipeline(device_of=(0, 1, 2), micro_batches=2)) == (
        "deadlock: device 1 waits in step 1 with 1B0 for 2B0 of device 2; device 2 waits in step 1 with 2F1 for 1F1 "
        "of device 1; move one of these actions behind others of its device\n"
        "  device 0  0F0 0F1 0B0 0B1\n"
        "  device 1  1F0 1B0 1F1 1B1\n"
        "                ^^^\n"
        "  device 2  2F0 2F1 2B0 2B1\n"
        "                ^^^"
    )


def test_too_much_in_flight_is_named_and_drawn() -> None:
    assert refusal(parse_programs("0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1"), TWO, in_flight=(2, 1)) == (
        "device 1, step 1: 1F1 makes stage 1 hold 2 micro-batches, but 1 may be in flight there; "
        "put a backward of stage 1 before it\n"
        "  device 0  0F0 0F1 0B0 0B1\n"
        "  device 1  1F0 1F1 1B0 1B1\n"
        "                ^^^"
    )


def test_a_bound_for_other_stages_is_refused() -> None:
    programs = make_programs(OneFOneB(), TWO)
    with pytest.raises(ScheduleError, match=r"^in_flight has 3 numbers for 2 stages; `bounds` gives them$"):
        check_program(programs, TWO, in_flight=(2, 2, 2))


def test_long_programs_are_shown_around_the_fault_only() -> None:
    pipeline = Pipeline(device_of=(0,), micro_batches=12)
    first, *rest = make_programs(OneFOneB(), pipeline)[0]
    programs = {0: (first, *rest[:10], rest[12], rest[11], rest[10], *rest[13:])}
    text = refusal(programs, pipeline)
    assert text == (
        "device 0, step 11: 0B6 needs 0F6, which comes in step 12 only; move it behind\n"
        "  device 0  ... 0B2  0F3  0B3  0F4  0B4  0F5  0B6  0F6  0B5  0F7  0B7  0F8  0B8  ...\n"
        "                                              ^^^^"
    )


def pointed(text: str) -> list[tuple[int, str]]:
    """Device and action under each arrow of a refusal."""
    found, device, row = [], -1, ""
    for line in text.splitlines()[1:]:
        if label := re.match(r"  device (\d+)", line):
            device, row = int(label[1]), line
        else:
            found += [(device, row[arrow.start() : arrow.end()].strip()) for arrow in re.finditer(r"\^+", line)]
    return found


PIPELINES = st.builds(
    Pipeline,
    device_of=st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple),
    micro_batches=st.integers(1, 5),
    ops=st.sampled_from([("F", "B"), ("F", "I", "W")]),
)


@st.composite
def right_ones(draw: st.DrawFn) -> tuple[Pipeline, dict[int, list[Action]], int, int]:
    """A pipeline, right programs, and a place in them."""
    pipeline = draw(PIPELINES)
    schedule = get_schedule(draw(st.sampled_from(schedule_names())))
    programs = {device: [*program] for device, program in make_programs(schedule, pipeline).items()}
    device = draw(st.sampled_from(sorted(programs)))
    return pipeline, programs, device, draw(st.integers(0, len(programs[device]) - 1))


Right = tuple[Pipeline, dict[int, list[Action]], int, int]


@settings(deadline=None)
@given(right=right_ones())
def test_an_action_taken_out_is_missed_at_the_end_of_its_device(right: Right) -> None:
    pipeline, programs, device, step = right
    action = programs[device].pop(step)
    text = refusal(programs, pipeline)
    assert text.startswith(f"device {device} never does {action}; add it\n")
    assert pointed(text) == [(device, "")]


@settings(deadline=None)
@given(right=right_ones(), data=st.data())
def test_an_action_put_in_again_is_pointed_at(right: Right, data: st.DataObject) -> None:
    pipeline, programs, device, step = right
    action = programs[device][step]
    programs[device].insert(data.draw(st.integers(0, len(programs[device]))), action)
    first, second = (at for at, other in enumerate(programs[device]) if other == action)
    text = refusal(programs, pipeline)
    assert text.startswith(f"device {device}, step {second}: {action} is done already in step {first}; remove one")
    assert pointed(text) == [(device, str(action))]


@settings(deadline=None)
@given(right=right_ones(), stranger=st.integers(0, 3))
def test_an_action_that_is_turned_into_another_is_pointed_at(right: Right, stranger: int) -> None:
    pipeline, programs, device, step = right
    programs[device][step] = Action(pipeline.stages + stranger, "F", 0)
    text = refusal(programs, pipeline)
    assert text.startswith(f"device {device}, step {step}: {programs[device][step]} is no action of this pipeline")
    assert pointed(text) == [(device, str(programs[device][step]))]


@settings(deadline=None)
@given(right=right_ones(), data=st.data())
def test_an_action_moved_to_another_device_is_pointed_at(right: Right, data: st.DataObject) -> None:
    pipeline, programs, device, step = right
    other = data.draw(st.integers(0, 3).filter(lambda index: index != device))
    action = programs[device].pop(step)
    programs.setdefault(other, []).insert(data.draw(st.integers(0, len(programs[other]))), action)
    text = refusal(programs, pipeline)
    assert f": {action} belongs to device {device}, which owns stage {action.stage}\n" in text
    assert pointed(text) == [(other, str(action))]


@settings(deadline=None, max_examples=300)
@given(right=right_ones(), data=st.data())
def test_a_shuffled_program_is_refused_exactly_if_it_cannot_be_obeyed(right: Right, data: st.DataObject) -> None:
    pipeline, programs, device, _ = right
    programs[device] = data.draw(st.permutations(programs[device]))
    if can_be_obeyed(programs, pipeline):
        check_program(programs, pipeline)
        return
    text = refusal(programs, pipeline)
    arrows = [(at, Action.parse(action)) for at, action in pointed(text)]
    assert arrows
    if text.startswith("deadlock"):
        # Each action that is pointed at waits for one that is pointed at as well, or stands behind it.
        for _, action in arrows:
            assert any(need in behind(programs[at], head) for need in pipeline.needs(action) for at, head in arrows)
    else:
        ((at, action),) = arrows
        assert any(need in behind(programs[at], action) for need in pipeline.needs(action))


def behind(program: list[Action], action: Action) -> list[Action]:
    return program[program.index(action) :]


def can_be_obeyed(programs: Programs, pipeline: Pipeline) -> bool:
    """By trying: take any action whose needs are met until none is left."""
    left = [[*program] for program in programs.values()]
    done: set[Action] = set()
    while any(left):
        ready = next((program for program in left if program and done.issuperset(pipeline.needs(program[0]))), None)
        if ready is None:
            return False
        done.add(ready.pop(0))
    return True


@settings(deadline=None)
@given(right=right_ones(), data=st.data())
def test_a_bound_below_what_a_stage_holds_is_refused_at_the_forward_that_exceeds_it(
    right: Right, data: st.DataObject
) -> None:
    pipeline, programs, _, _ = right
    stage = data.draw(st.integers(0, pipeline.stages - 1))
    own = [action for action in programs[pipeline.device_of[stage]] if action.stage == stage]
    held = [forwards_ahead(own[: step + 1], pipeline) for step in range(len(own))]
    bound = data.draw(st.integers(0, max(held) - 1))
    in_flight = [pipeline.micro_batches] * pipeline.stages
    in_flight[stage] = bound
    exceeding = own[next(step for step, number in enumerate(held) if number > bound)]
    text = refusal(programs, pipeline, in_flight=tuple(in_flight))
    assert f": {exceeding} makes stage {stage} hold {bound + 1} micro-batches, but {bound} may be" in text
    assert pointed(text) == [(pipeline.device_of[stage], str(exceeding))]


def forwards_ahead(actions: list[Action], pipeline: Pipeline) -> int:
    ops = [action.op for action in actions]
    return ops.count("F") - ops.count(pipeline.ops[-1])


def test_what_the_bound_allows_is_accepted() -> None:
    pipeline = Pipeline(device_of=(0, 1, 0), micro_batches=4)
    check_program(make_programs(OneFOneB(), pipeline), pipeline, in_flight=bounds(OneFOneB(), pipeline))
