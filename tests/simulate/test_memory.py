"""What devices keep over time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import (
    GPipe,
    OneFOneB,
    Pipeline,
    Schedule,
    Sequential,
    Span,
    Timeline,
    ZeroBubble,
    bounds,
)
from lightning_hetero.simulate import MemoryCurve, StageCost, memory_curves, peak_alive, simulate

THREE = [StageCost(device=f"dev{n}", forward_s=1, backward_s=2) for n in range(3)]


def test_a_micro_batch_is_kept_from_its_forward_to_the_end_of_its_backward() -> None:
    timeline = simulate(THREE[:2], OneFOneB(spare=0), 2)
    assert memory_curves(timeline, kept_bytes=(10, 100)) == {
        "dev0": MemoryCurve(times_s=(0, 1, 6, 9), micro_batches=(1, 2, 1, 0), kept_bytes=(10, 20, 10, 0)),
        "dev1": MemoryCurve(times_s=(1, 4, 4, 7), micro_batches=(1, 0, 1, 0), kept_bytes=(100, 0, 100, 0)),
    }


@pytest.mark.parametrize(
    ("schedule", "held"),
    [
        (Sequential(), (1, 1, 1)),
        (OneFOneB(spare=0), (3, 2, 1)),
        (OneFOneB(spare=1), (4, 3, 1)),  # the last stage has nothing to wait for
        (GPipe(), (6, 6, 6)),
    ],
)
def test_the_peak_is_what_the_schedule_keeps_in_flight(schedule: Schedule, held: tuple[int, ...]) -> None:
    timeline = simulate(THREE, schedule, 6)
    curves = memory_curves(timeline, kept_bytes=(7, 7, 7))
    assert tuple(curve.peak_micro_batches for curve in curves.values()) == held
    assert tuple(curve.peak_bytes for curve in curves.values()) == tuple(7 * number for number in held)
    assert peak_alive(timeline) == held[0]


def test_a_split_backward_keeps_until_the_gradient_of_the_weights() -> None:
    whole = memory_curves(simulate(THREE, OneFOneB(spare=0), 6), kept_bytes=(1, 1, 1))
    split = memory_curves(simulate(THREE, ZeroBubble(spare=0), 6), kept_bytes=(1, 1, 1))
    assert [curve.peak_micro_batches for curve in whole.values()] == [3, 2, 1]
    assert [curve.peak_micro_batches for curve in split.values()] == [3, 3, 3]


def test_inference_keeps_one_micro_batch_while_it_works_on_it() -> None:
    timeline = simulate(THREE, GPipe(), 6, ops=("F",))
    assert {curve.peak_micro_batches for curve in memory_curves(timeline, (1, 1, 1)).values()} == {1}
    assert peak_alive(timeline) == 3


def test_several_stages_of_a_device_add_up() -> None:
    stages = [StageCost(device=name, forward_s=1, backward_s=1) for name in ("cpu", "cuda:0", "cpu")]
    curve = memory_curves(simulate(stages, GPipe(), 1), kept_bytes=(1, 10, 100))["cpu"]
    assert curve == MemoryCurve(times_s=(0, 2, 4, 6), micro_batches=(1, 1, 1, 0), kept_bytes=(1, 101, 1, 0))


@settings(deadline=None)
@given(
    seconds=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    micro_batches=st.integers(1, 8),
    spare=st.integers(0, 2),
    send_s=st.integers(0, 3),
)
def test_unequal_stages_stay_within_the_bound_and_end_empty(
    seconds: list[tuple[int, int]], micro_batches: int, spare: int, send_s: int
) -> None:
    stages = [
        StageCost(device=f"dev{n}", forward_s=f, backward_s=b, send_forward_s=send_s, send_backward_s=send_s)
        for n, (f, b) in enumerate(seconds)
    ]
    schedule = OneFOneB(spare=spare)
    held = bounds(schedule, Pipeline(device_of=tuple(range(len(stages))), micro_batches=micro_batches))
    timeline = simulate(stages, schedule, micro_batches)
    curves = [*memory_curves(timeline, [1] * len(stages)).values()]
    assert all(curve.peak_bytes <= most for curve, most in zip(curves, held, strict=True))
    assert peak_alive(timeline) == curves[0].peak_micro_batches
    assert [curve.kept_bytes[-1] for curve in curves] == [0] * len(stages)


def test_other_work_keeps_nothing_and_a_measured_overlap_of_ticks_is_none() -> None:
    timeline = Timeline(
        (
            Span(device="cpu", op="F", stage=0, micro_batch=0, start_s=0, duration_s=1),
            Span(device="cpu", op="B", stage=0, micro_batch=0, start_s=1, duration_s=1),
            Span(device="cpu", op="F", stage=0, micro_batch=1, start_s=2 - 1e-7, duration_s=1),
            Span(device="cpu", op="optimizer", start_s=4, duration_s=1),
        ),
        devices=("cpu", "cuda:0"),
    )
    curves = memory_curves(timeline, kept_bytes=(8,))
    assert (curves["cpu"].peak_bytes, curves["cpu"].kept_bytes) == (8, (8, 0, 8, 0))
    assert curves["cuda:0"] == MemoryCurve()
    assert (curves["cuda:0"].peak_bytes, curves["cuda:0"].peak_micro_batches) == (0, 0)
    assert peak_alive(Timeline()) == 0


def test_every_stage_needs_its_number_of_bytes() -> None:
    says = re.escape("kept_bytes has 2 numbers for 3 stages; give one for each")
    with pytest.raises(ScheduleError, match=f"^{says}$"):
        memory_curves(simulate(THREE, GPipe(), 1), kept_bytes=(1, 1))
