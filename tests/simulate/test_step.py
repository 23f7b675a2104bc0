"""The simulator against formulas, hand calculations and the checker."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import (
    TRANSFER,
    Action,
    GPipe,
    Interleaved1F1B,
    OneFOneB,
    Op,
    Pipeline,
    Schedule,
    Sequential,
    Timeline,
    ZeroBubble,
    bounds,
    check_program,
    draw,
    get_schedule,
    schedule_names,
)
from lightning_hetero.simulate import StageCost, simulate


def chain(*forward_s: float, backward: float = 2, send_s: float = 0, return_s: float | None = None) -> list[StageCost]:
    """Stages on devices of their own, with backwards that take so many times as long as forwards."""
    back_s = send_s if return_s is None else return_s
    return [
        StageCost(
            device=f"dev{index}",
            forward_s=seconds,
            backward_s=backward * seconds,
            send_forward_s=send_s,
            send_backward_s=back_s,
        )
        for index, seconds in enumerate(forward_s)
    ]


def order(timeline: Timeline, pipeline: Pipeline) -> dict[int, list[Action]]:
    """What each device did, as the program that it obeyed."""
    done: dict[int, list[Action]] = {device: [] for device in pipeline.devices}
    for span in timeline.spans:
        if span.op != TRANSFER:
            action = Action.parse(str(span))
            done[pipeline.device_of[action.stage]].append(action)
    return done


# Formulas. Times are whole numbers, so sums are exact.


@pytest.mark.parametrize("schedule", [GPipe(), OneFOneB(spare=0), OneFOneB()])
@settings(deadline=None)
@given(
    stages=st.integers(1, 5), micro_batches=st.integers(1, 8), forward_s=st.integers(1, 9), backward=st.integers(1, 3)
)
def test_equal_stages_take_the_fill_and_then_one_turn_for_each_micro_batch(
    schedule: Schedule, stages: int, micro_batches: int, forward_s: int, backward: int
) -> None:
    """Huang et al., GPipe, section 2.3: a bubble of (S - 1) / (M + S - 1)."""
    timeline = simulate(chain(*[forward_s] * stages, backward=backward), schedule, micro_batches)
    turns = stages - 1 + micro_batches
    assert timeline.makespan_s == turns * forward_s * (1 + backward)
    assert timeline.bubble_share == pytest.approx((stages - 1) / turns, abs=1e-12)


@settings(deadline=None)
@given(
    seconds=st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=5),
    micro_batches=st.integers(1, 6),
    overlap=st.booleans(),
)
def test_gpipe_is_a_flow_shop_there_and_one_back(
    seconds: list[tuple[int, int, int, int]], micro_batches: int, overlap: bool
) -> None:
    """Equal jobs through machines in a row take one job's way and (M - 1) turns of the slowest machine.

    A link that overlaps with work is a machine of its own; otherwise it is part of the machine that receives.
    """
    stages = [
        StageCost(device=f"dev{n}", forward_s=f, backward_s=b, send_forward_s=over, send_backward_s=back)
        for n, (f, b, over, back) in enumerate(seconds)
    ]
    forward = [stage.forward_s for stage in stages]
    backward = [stage.backward_s for stage in stages]
    over = [stage.send_forward_s for stage in stages[:-1]]
    back = [stage.send_backward_s for stage in stages[1:]]
    if overlap:
        there, return_ = forward + over, backward + back
    else:
        there = [f + receive for f, receive in zip(forward, [0, *over], strict=True)]
        return_ = [b + receive for b, receive in zip(backward, [*back, 0], strict=True)]

    timeline = simulate(stages, GPipe(), micro_batches, overlap=overlap)
    expected_s = sum(sum(way) + (micro_batches - 1) * max(way) for way in (there, return_))
    assert timeline.end_s == expected_s


@settings(deadline=None)
@given(forward_s=st.lists(st.integers(1, 9), min_size=1, max_size=5), micro_batches=st.integers(1, 6))
def test_sequential_overlaps_nothing(forward_s: list[int], micro_batches: int) -> None:
    timeline = simulate(chain(*forward_s, send_s=1, return_s=2), Sequential(), micro_batches)
    assert timeline.makespan_s == micro_batches * (3 * sum(forward_s) + 3 * (len(forward_s) - 1))


@settings(deadline=None)
@given(
    name=st.sampled_from(schedule_names()),
    forward_s=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    micro_batches=st.integers(1, 8),
    send_s=st.integers(0, 4),
)
def test_the_bottleneck_bounds_every_schedule(name: str, forward_s: list[int], micro_batches: int, send_s: int) -> None:
    """The first micro-batch has to reach the slowest stage, which then has all of them to do."""
    timeline = simulate(chain(*forward_s, send_s=send_s), get_schedule(name), micro_batches)
    slowest = forward_s.index(max(forward_s))
    fill_s = sum(forward_s[:slowest]) + slowest * send_s
    assert timeline.makespan_s >= fill_s + micro_batches * 3 * max(forward_s)
    assert timeline.busy_s == {f"dev{n}": 3 * f * micro_batches for n, f in enumerate(forward_s)}


@pytest.mark.parametrize("forward_s", [(6, 2), (2, 6), (2, 6, 3), (5, 1, 4), (3, 3, 3)])
def test_with_1f1b_a_further_micro_batch_costs_one_turn_of_the_bottleneck(forward_s: tuple[int, ...]) -> None:
    steps_s = [simulate(chain(*forward_s), OneFOneB(), micro_batches).makespan_s for micro_batches in range(6, 12)]
    assert {later - before for before, later in pairwise(steps_s)} == {3 * max(forward_s)}


@pytest.mark.parametrize(
    ("forward_s", "schedule", "micro_batches", "makespan_s"),
    [
        # A slow first stage never waits: backwards of others hide behind its forwards.
        ((60, 20), OneFOneB(), 2, 2 * 180),
        ((60, 20), OneFOneB(), 8, 8 * 180),
        # A slow second stage waits for one forward, and one backward of the first stage is left after it.
        ((20, 60), OneFOneB(), 4, 20 + 4 * 180 + 40),
        # GPipe cannot begin backwards early.
        ((60, 20), GPipe(), 4, 80 + 3 * 60 + 160 + 3 * 120),
        ((20, 60), GPipe(), 4, 80 + 3 * 60 + 160 + 3 * 120),
    ],
)
def test_unequal_stages_by_hand(
    forward_s: tuple[float, ...], schedule: Schedule, micro_batches: int, makespan_s: float
) -> None:
    assert simulate(chain(*forward_s), schedule, micro_batches).makespan_s == makespan_s


# Transfers.


def test_a_picture_with_transfers_beside_the_work() -> None:
    timeline = simulate(chain(2, 2, backward=1, send_s=1), GPipe(), 3)
    assert draw(timeline, width=36).splitlines() == [
        "dev0  F0──F1──F2──··········~~B0──B1──B2──   67 %",
        "dev1  ····~~F0──F1──F2──B0──B1──B2──······   67 %",
        "18 s, bubble 33 %",
    ]


def test_overlapping_transfers_leave_the_sender_free() -> None:
    timeline = simulate(chain(2, 2, send_s=1), GPipe(), 2)
    starts = {str(span): (span.device, span.start_s) for span in timeline.spans}
    assert starts["0F1"] == ("dev0", 2)
    assert starts["1transfer0"] == ("dev1", 2)
    assert starts["1F0"] == ("dev1", 3)


def test_a_link_carries_one_transfer_at_a_time_in_each_direction() -> None:
    slow_link = simulate(chain(1, 1, backward=1, send_s=5), GPipe(), 3, ops=("F",))
    assert [span.start_s for span in slow_link.spans if span.op == TRANSFER] == [1, 6, 11]
    assert slow_link.end_s == 17

    both = simulate(chain(1, 1, backward=1, send_s=5), OneFOneB(), 2)
    moves = [(str(span), span.start_s) for span in both.spans if span.op == TRANSFER]
    assert moves == [("1transfer0", 1), ("1transfer1", 6), ("0transfer0", 8), ("0transfer1", 13)]


def test_without_overlap_the_receiver_copies_before_it_works() -> None:
    timeline = simulate(chain(2, 2, send_s=1), GPipe(), 2, ops=("F",), overlap=False)
    assert sorted((span.device, str(span), span.start_s, span.end_s) for span in timeline.spans) == [
        ("dev0", "0F0", 0, 2),
        ("dev0", "0F1", 2, 4),
        ("dev1", "1F0", 3, 5),
        ("dev1", "1F1", 6, 8),
        ("dev1", "1transfer0", 2, 3),
        ("dev1", "1transfer1", 5, 6),
    ]


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("overlap", [True, False])
def test_each_border_is_crossed_once_in_each_direction_by_each_micro_batch(name: str, overlap: bool) -> None:
    timeline = simulate(chain(2, 3, 1, send_s=1, return_s=2), get_schedule(name), 4, overlap=overlap)
    moved = sorted((str(span), span.duration_s) for span in timeline.spans if span.op == TRANSFER)
    there = [(f"{stage}transfer{micro_batch}", 1) for stage in (1, 2) for micro_batch in range(4)]
    back = [(f"{stage}transfer{micro_batch}", 2) for stage in (0, 1) for micro_batch in range(4)]
    assert moved == sorted(there + back)


def test_stages_of_one_device_send_each_other_nothing() -> None:
    stages = [StageCost(device="cpu", forward_s=1, backward_s=1, send_forward_s=9, send_backward_s=9)] * 3
    assert simulate(stages, OneFOneB(), 2).makespan_s == 12
    assert simulate(stages, OneFOneB(), 2, overlap=False).makespan_s == 12


@settings(deadline=None)
@given(forward_s=st.lists(st.integers(1, 9), min_size=2, max_size=4), micro_batches=st.integers(1, 6))
def test_gpipe_is_no_slower_if_transfers_overlap(forward_s: list[int], micro_batches: int) -> None:
    stages = chain(*forward_s, send_s=2)
    apart = simulate(stages, GPipe(), micro_batches)
    in_turn = simulate(stages, GPipe(), micro_batches, overlap=False)
    assert apart.makespan_s <= in_turn.makespan_s


def test_one_spare_micro_batch_hides_transfers() -> None:
    """Just in time is too late when the way takes time: each turn waits for the link without a spare one."""
    stages = chain(4, 4, send_s=1)
    ideal_s = [(micro_batches + 1) * 12 + 2 for micro_batches in (8, 16)]  # only fill and drain wait for the link
    assert [simulate(stages, OneFOneB(), micro_batches).makespan_s for micro_batches in (8, 16)] == ideal_s
    late_s = [simulate(stages, OneFOneB(spare=0), micro_batches).makespan_s for micro_batches in (8, 16)]
    assert late_s == [ideal_s[0] + 6, ideal_s[1] + 14]


# Schedules.


@settings(deadline=None, max_examples=200)
@given(
    name=st.sampled_from(schedule_names()),
    costs=st.lists(
        st.builds(
            StageCost,
            device=st.sampled_from(["cpu", "cuda:0", "npu:0"]),
            forward_s=st.floats(0.125, 9),
            backward_s=st.floats(0.25, 9),
            weight_gradient_s=st.floats(0.125, 9),
            send_forward_s=st.floats(0, 3),
            send_backward_s=st.floats(0, 3),
        ),
        min_size=1,
        max_size=5,
    ),
    micro_batches=st.integers(1, 6),
    overlap=st.booleans(),
)
def test_whatever_things_take_the_checker_accepts_what_devices_did(
    name: str, costs: list[StageCost], micro_batches: int, overlap: bool
) -> None:
    schedule = get_schedule(name)
    names = [*dict.fromkeys(cost.device for cost in costs)]
    ops: tuple[Op, ...] = ("F", "I", "W") if schedule.splits_backward else ("F", "B")
    device_of = tuple(names.index(cost.device) for cost in costs)
    pipeline = Pipeline(device_of=device_of, micro_batches=micro_batches, ops=ops)

    timeline = simulate(costs, schedule, micro_batches, overlap=overlap)
    assert timeline.devices == tuple(names)
    check_program(order(timeline, pipeline), pipeline, in_flight=bounds(schedule, pipeline))
    ends_s = {str(span): span.end_s for span in timeline.spans}
    for span in timeline.spans:
        if span.op != TRANSFER:
            assert all(ends_s[str(need)] <= span.start_s for need in pipeline.needs(Action.parse(str(span))))
    assert simulate(costs, schedule, micro_batches, overlap=overlap) == timeline


def test_a_device_that_gets_free_knows_what_arrives_at_that_moment() -> None:
    timeline = simulate(chain(1, 1, backward=1), OneFOneB(spare=2), 4)  # 0F2 and 1B0 end at the same time
    assert " ".join(str(span) for span in timeline.work_of("dev0")) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"


def test_interleaving_shortens_the_fill() -> None:
    """Narayanan et al., SC 2021, section 2.2.2: with v stages on each device the bubble is v times smaller."""
    halves = [StageCost(device=f"dev{n}", forward_s=1, backward_s=2) for n in (0, 1, 0, 1)]
    assert simulate(chain(2, 2), OneFOneB(), 8).makespan_s == (8 + 1) * 6
    assert simulate(halves, Interleaved1F1B(), 8).makespan_s == 8 * 6 + 6 / 2


UNEQUAL = [(60, 50), (50, 60), (30, 24, 30), (24, 30, 36, 30)]


@pytest.mark.parametrize("forward_s", UNEQUAL)
@pytest.mark.parametrize("micro_batches", [4, 8])
def test_zero_bubble_wins_on_unequal_stages_if_splitting_costs_nothing(
    forward_s: tuple[float, ...], micro_batches: int
) -> None:
    stages = chain(*forward_s)
    whole = simulate(stages, OneFOneB(), micro_batches)
    split = simulate(stages, ZeroBubble(), micro_batches)
    assert split.busy_s == whole.busy_s
    assert split.makespan_s < 0.97 * whole.makespan_s


def test_zero_bubble_loses_on_two_stages_if_splitting_costs_a_tenth_of_the_backward() -> None:
    stages = [
        StageCost(device=f"dev{n}", forward_s=f, backward_s=2 * f, weight_gradient_s=1.2 * f)
        for n, f in enumerate((60, 50))
    ]
    assert simulate(stages, ZeroBubble(), 16).makespan_s > simulate(stages, OneFOneB(), 16).makespan_s


def test_forward_and_backward_alone_add_up_to_gpipe() -> None:
    """As where user code runs between them on the whole batch."""
    stages = chain(3, 1, 2, send_s=1)
    there = simulate(stages, GPipe(), 4, ops=("F",))
    back = simulate(stages, GPipe(), 4, ops=("B",))
    assert there.end_s + back.end_s == simulate(stages, GPipe(), 4).end_s
    assert simulate(stages, OneFOneB(), 4, ops=("F",)) == there


# What it is told.


def test_halves_of_a_backward_are_equal_unless_they_are_given() -> None:
    stage = StageCost(device="cpu", forward_s=1, backward_s=4)
    assert [stage.seconds(op) for op in ("F", "B", "I", "W")] == [1, 4, 2, 2]
    stage = StageCost(device="cpu", forward_s=1, backward_s=4, input_gradient_s=0, weight_gradient_s=5)
    assert [stage.seconds(op) for op in ("F", "B", "I", "W")] == [1, 4, 0, 5]


@pytest.mark.parametrize("field", ["forward_s", "backward_s", "weight_gradient_s", "send_forward_s"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_seconds_are_refused(field: str, value: float) -> None:
    says = rf"^a stage on 'cpu': {field} must be finite seconds, at least 0; got {value}$"
    with pytest.raises(ScheduleError, match=says):
        StageCost(**{"device": "cpu", "forward_s": 1, "backward_s": 1, field: value})


def test_without_stages_or_micro_batches_there_is_nothing_to_simulate() -> None:
    with pytest.raises(
        ScheduleError, match=r"^device_of must name a device, from 0, for at least one stage; got \(\)$"
    ):
        simulate([], GPipe(), 1)
    with pytest.raises(ScheduleError, match=r"^a step has at least 1 micro-batch, got 0$"):
        simulate(chain(1), GPipe(), 0)
