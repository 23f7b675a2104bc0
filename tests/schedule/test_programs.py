"""Programs as pictures, beside those of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torchs

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import (
    Action,
    GPipe,
    Interleaved1F1B,
    OneFOneB,
    Pipeline,
    Programs,
    Schedule,
    Sequential,
    Timeline,
    ZeroBubble,
    bounds,
    check_program,
    format_programs,
    make_programs,
    parse_programs,
)

Obey = Callable[[Programs, Pipeline, Callable[[Action], float]], Timeline]


def rows(schedule: Schedule, *device_of: int, micro_batches: int) -> list[str]:
    pipeline = Pipeline(device_of=device_of, micro_batches=micro_batches)
    return [" ".join(map(str, program)) for program in make_programs(schedule, pipeline).values()]


def test_sequential_lets_the_next_micro_batch_in_when_the_one_before_has_left() -> None:
    assert rows(Sequential(), 0, 1, micro_batches=3) == [
        "0F0 0B0 0F1 0B1 0F2 0B2",
        "1F0 1B0 1F1 1B1 1F2 1B2",
    ]


def test_gpipe_does_all_forwards_then_all_backwards() -> None:
    assert rows(GPipe(), 0, 1, 2, micro_batches=4) == [
        "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3",
        "1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3",
        "2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3",
    ]


def test_one_f_one_b_warms_up_alternates_and_drains() -> None:
    assert rows(OneFOneB(spare=0), 0, 1, 2, micro_batches=4) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_a_spare_micro_batch_lengthens_the_warm_up_only_where_a_device_would_wait() -> None:
    assert rows(OneFOneB(), 0, 1, 2, micro_batches=5) == [
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0B2 0B3 0B4",
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1B3 1B4",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2F4 2B4",
    ]


def test_interleaved_takes_a_round_of_micro_batches_through_one_stage_of_a_device_after_the_other() -> None:
    assert rows(Interleaved1F1B(spare=0), 0, 1, 0, 1, micro_batches=4) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]


def test_a_split_backward_stays_together_and_inference_has_forwards_alone() -> None:
    split = Pipeline(device_of=(0, 1), micro_batches=2, ops=("F", "I", "W"))
    assert format_programs(make_programs(OneFOneB(spare=0), split)) == (
        "0F0,0F1,0I0,0W0,0I1,0W1\n"  #
        "1F0,1I0,1W0,1F1,1I1,1W1"
    )
    inference = Pipeline(device_of=(0, 1), micro_batches=3, ops=("F",))
    assert format_programs(make_programs(OneFOneB(spare=0), inference)) == "0F0,0F1,0F2\n1F0,1F1,1F2"


def test_zero_bubble_lets_gradients_of_inputs_go_first() -> None:
    split = Pipeline(device_of=(0, 1, 2), micro_batches=4, ops=("F", "I", "W"))
    assert format_programs(make_programs(ZeroBubble(spare=0), split)) == (
        "0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3\n"
        "1F0,1F1,1F2,1I0,1W0,1I1,1W1,1F3,1I2,1W2,1I3,1W3\n"
        "2F0,2I0,2F1,2I1,2F2,2I2,2W0,2F3,2I3,2W1,2W2,2W3"
    )


def test_a_backward_alone_runs_from_the_last_stage_to_the_first() -> None:
    backward = Pipeline(device_of=(0, 1), micro_batches=2, ops=("B",))
    assert format_programs(make_programs(GPipe(), backward)) == "0B0,0B1\n1B0,1B1"


def test_stages_may_stand_on_any_devices() -> None:
    assert rows(OneFOneB(spare=0), 2, 2, 0, micro_batches=2) == [
        "2F0 2B0 2F1 2B1",
        "0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1",
    ]


# torch's generators read these attributes and nothing else, so no process group is needed.


def torchs_chain(kind: type, stages: int, micro_batches: int) -> Programs:
    fake = SimpleNamespace(_num_stages=stages, _n_microbatches=micro_batches)
    return without_idle_slots(kind._get_pipeline_order(fake))  # type: ignore[attr-defined]


def torchs_interleaved(devices: int, laps: int, micro_batches: int) -> Programs:
    rounds = max(1, micro_batches // devices)
    assert micro_batches % rounds == 0, "torch refuses unequal rounds"
    fake = SimpleNamespace(
        pp_group_size=devices,
        n_local_stages=laps,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // rounds,
    )
    generate = torchs.ScheduleInterleaved1F1B._calculate_single_rank_operations
    return without_idle_slots({rank: generate(fake, rank) for rank in range(devices)})  # type: ignore[arg-type]


def without_idle_slots(table: Mapping[int, Sequence[object]]) -> Programs:
    lines = [
        ",".join("" if cell is None or "REDUCE_GRAD" in str(cell) else str(cell) for cell in table[rank])
        for rank in sorted(table)
    ]
    return parse_programs("\n".join(lines))


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("more", [0, 1, 5])
def test_gpipe_is_torchs(stages: int, more: int) -> None:
    pipeline = Pipeline(device_of=tuple(range(stages)), micro_batches=stages + more)
    assert make_programs(GPipe(), pipeline) == torchs_chain(torchs.ScheduleGPipe, stages, stages + more)


@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("more", [0, 1, 5])
def test_1f1b_without_spare_micro_batches_is_torchs(stages: int, more: int) -> None:
    pipeline = Pipeline(device_of=tuple(range(stages)), micro_batches=stages + more)
    ours = make_programs(OneFOneB(spare=0), pipeline)
    theirs = dict(torchs_chain(torchs.Schedule1F1B, stages, stages + more))
    # torch 2.13 numbers the forwards of the last rank from 1 in this table, though it runs them from 0.
    last = stages - 1
    forwards = (action for action in ours[last] if action.op == "F")
    theirs[last] = [next(forwards) if action.op == "F" else action for action in theirs[last]]
    assert {rank: [*program] for rank, program in ours.items()} == {rank: [*row] for rank, row in theirs.items()}


RINGS = [  # devices, laps, micro-batches in as many equal rounds as torch demands
    (d, v, m) for d in (1, 2, 3, 4) for v in (1, 2, 3) for m in sorted({1, 2, d, 2 * d, 3 * d}) if m <= d or m % d == 0
]


@pytest.mark.parametrize(("devices", "laps", "micro_batches"), RINGS)
def test_interleaved_prefers_what_comes_first_in_torchs_table(devices: int, laps: int, micro_batches: int) -> None:
    pipeline = Pipeline(device_of=(*range(devices),) * laps, micro_batches=micro_batches)
    for program in torchs_interleaved(devices, laps, micro_batches).values():
        places = [Interleaved1F1B().priority(action, pipeline) for action in program]
        assert places == sorted(set(places))


@pytest.mark.parametrize(("devices", "laps", "micro_batches"), RINGS)
@pytest.mark.parametrize("backward_s", [1.0, 2.0])
@pytest.mark.parametrize("spare", [0, 1])
def test_interleaved_is_as_fast_as_torchs_and_holds_as_little(
    obey: Obey, devices: int, laps: int, micro_batches: int, backward_s: float, spare: int
) -> None:
    pipeline = Pipeline(device_of=(*range(devices),) * laps, micro_batches=micro_batches)
    table = torchs_interleaved(devices, laps, micro_batches)
    schedule = Interleaved1F1B(spare=spare)

    def seconds(action: Action) -> float:
        return 1.0 if action.op == "F" else backward_s

    ours = obey(make_programs(schedule, pipeline), pipeline, seconds)
    assert ours.makespan_s <= obey(table, pipeline, seconds).makespan_s
    check_program(table, pipeline, in_flight=bounds(Interleaved1F1B(spare=0), pipeline))


def torchs_zero_bubble(devices: int, laps: int, micro_batches: int) -> Programs:
    fake = SimpleNamespace(
        pp_group_size=devices,
        n_local_stages=laps,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // max(1, micro_batches // devices),
    )
    generate = torchs.ScheduleInterleavedZeroBubble._calculate_single_rank_operations
    return without_idle_slots({rank: generate(fake, rank) for rank in range(devices)})  # type: ignore[arg-type]


CHAINS = [(d, m) for d in (2, 3, 4) for m in (d, 2 * d, 3 * d)]


@pytest.mark.parametrize(("devices", "micro_batches"), CHAINS)
def test_zero_bubble_is_as_fast_as_torchs_and_holds_as_little(obey: Obey, devices: int, micro_batches: int) -> None:
    pipeline = Pipeline(device_of=tuple(range(devices)), micro_batches=micro_batches, ops=("F", "I", "W"))
    table = torchs_zero_bubble(devices, 1, micro_batches)
    schedule = ZeroBubble(spare=0)

    ours = obey(make_programs(schedule, pipeline), pipeline, lambda action: 1.0)
    assert ours.makespan_s <= obey(table, pipeline, lambda action: 1.0).makespan_s
    check_program(table, pipeline, in_flight=bounds(schedule, pipeline))


@pytest.mark.parametrize(("devices", "micro_batches"), CHAINS)
def test_the_checker_accepts_torchs_other_tables(devices: int, micro_batches: int) -> None:
    ring = Pipeline(device_of=(*range(devices),) * 2, micro_batches=micro_batches, ops=("F", "I", "W"))
    check_program(torchs_zero_bubble(devices, 2, micro_batches), ring)

    generate = torchs.ScheduleZBVZeroBubble._calculate_single_rank_operations
    fake = SimpleNamespace(pp_group_size=devices, num_stages=2 * devices, _n_microbatches=micro_batches)
    there_and_back = Pipeline(
        device_of=(*range(devices), *reversed(range(devices))), micro_batches=micro_batches, ops=("F", "I", "W")
    )
    table = without_idle_slots({rank: generate(fake, rank) for rank in range(devices)})  # type: ignore[arg-type]
    check_program(table, there_and_back)


def test_programs_go_through_torchs_table() -> None:
    programs = {0: tuple(map(Action.parse, ["0F0", "0B0"])), 2: (Action(1, "F", 0),)}

    assert format_programs(programs) == "0F0,0B0\n\n1F0"
    assert parse_programs("0F0,0B0\n\n1F0") == {**programs, 1: ()}
    assert parse_programs(",0F0,,0B0\n") == {0: programs[0]}
    assert format_programs({}) == ""
    with pytest.raises(ScheduleError, match=r"^'0X0' is not an action"):
        parse_programs("0F0,0X0")
