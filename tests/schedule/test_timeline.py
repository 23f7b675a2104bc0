"""The timeline: who is busy when, and a file that is read back bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import TRANSFER, Span, Timeline


def span(device: str, op: str, start_s: float, duration_s: float, **where: int) -> Span:
    return Span(device=device, op=op, start_s=start_s, duration_s=duration_s, **where)


TWO = Timeline(
    (
        span("cuda:0", "F", 10, 1, stage=0, micro_batch=0),
        span("cuda:1", TRANSFER, 11, 0.5, stage=1, micro_batch=0),
        span("cuda:1", "F", 11.5, 2, stage=1, micro_batch=0),
        span("cuda:1", "B", 13.5, 4, stage=1, micro_batch=0),
        span("cuda:0", "B", 17.5, 2.5, stage=0, micro_batch=0),
    ),
    devices=("cuda:0", "cuda:1", "cpu"),
)


def test_it_knows_how_long_it_is_and_how_long_each_device_works() -> None:
    assert (TWO.start_s, TWO.end_s, TWO.makespan_s) == (10, 20, 10)
    assert TWO.busy_s == {"cuda:0": 3.5, "cuda:1": 6, "cpu": 0}
    assert TWO.utilisation == {"cuda:0": 0.35, "cuda:1": 0.6, "cpu": 0}
    assert TWO.bubble_share == pytest.approx(1 - (0.35 + 0.6) / 3, abs=1e-15)


def test_transfers_are_no_work() -> None:
    assert [str(work) for work in TWO.work_of("cuda:1")] == ["1F0", "1B0"]
    assert Timeline((span("cpu", TRANSFER, 0, 1),)).bubble_share == 1


def test_without_spans_nobody_is_busy() -> None:
    empty = Timeline(devices=("cpu",))
    assert (empty.makespan_s, empty.busy_s, empty.utilisation, empty.bubble_share) == (0, {"cpu": 0}, {"cpu": 0}, 0)
    assert Timeline().bubble_share == 0


def test_spans_come_in_order_of_time_and_add_their_devices() -> None:
    late, early = span("b", "B", 5, 1), span("a", "F", 0, 1)
    timeline = Timeline((late, early), devices=("c",))
    assert timeline == Timeline((early, late), devices=("c", "a", "b"))
    assert timeline.spans == (early, late)
    assert timeline.devices == ("c", "a", "b")


def test_a_span_that_belongs_to_no_stage_has_the_name_of_its_op() -> None:
    assert str(span("cpu", "optimizer", 0, 1)) == "optimizer"


@pytest.mark.parametrize(("start_s", "duration_s"), [(0, -1), (float("nan"), 1), (0, float("inf"))])
def test_impossible_times_are_refused(start_s: float, duration_s: float) -> None:
    says = rf"^1F0 on 'cpu': times must be finite and none negative, got start_s={start_s} and duration_s={duration_s}$"
    with pytest.raises(ScheduleError, match=says):
        span("cpu", "F", start_s, duration_s, stage=1, micro_batch=0)


def test_a_device_does_one_thing_at_a_time() -> None:
    work = span("cpu", "F", 0, 2, micro_batch=0)
    says = (
        r"^'cpu' cannot do F1 from 1 s and F0 until 2 s: a device does one thing at a time; "
        r"give spans that run beside its work the op 'transfer'$"
    )
    with pytest.raises(ScheduleError, match=says):
        Timeline((span("cpu", "F", 1, 2, micro_batch=1), work))
    Timeline((span("cpu", TRANSFER, 1, 2), span("cpu", TRANSFER, 1, 1), work))
    Timeline((span("cuda:0", "F", 1, 2), work))
    Timeline((span("cpu", "F", 2 - 1e-7, 2), work))  # no clock is that fine


SPANS = st.builds(
    span,
    st.sampled_from(["cpu", "cuda:0"]),
    st.just(TRANSFER),
    st.floats(-1e9, 1e9),
    st.floats(0, 1e9),
    stage=st.none() | st.integers(0, 9),
    micro_batch=st.none() | st.integers(0, 9),
)


@settings(deadline=None)
@given(timeline=st.builds(Timeline, st.lists(SPANS).map(tuple), st.just(("npu:1",))))
def test_it_is_read_back_bit_for_bit(timeline: Timeline) -> None:
    assert Timeline.from_json(timeline.to_json()) == timeline


def as_json(**changes: Any) -> str:
    return json.dumps({**TWO.to_dict(), **changes})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"^the timeline is not valid JSON \(Expecting property name .*\); it was cut short or edited$"),
        ("[]", r"^not a timeline of this package: the field 'format' must be 'lightning_hetero.timeline'$"),
        (as_json(format="x"), r"^not a timeline of this package: the field 'format' must be"),
        (as_json(version=2), r"^the timeline has version 2, this package reads 1; record it again, or use the version"),
        (as_json(spans=[{}]), r"^the timeline is damaged: TypeError: "),
        (as_json(spans=None), r"^the timeline is damaged: TypeError: "),
        (as_json(devices=[1]), r"^the timeline is damaged: TypeError: expected a text, got 1$"),
        ('{"format": "lightning_hetero.timeline", "version": 1}', r"^the timeline is damaged: KeyError: 'spans'$"),
        (
            as_json(spans=[{"device": "cpu", "op": "F", "start_s": 0, "duration_s": 1, "stage": True}]),
            r"^the timeline is damaged: TypeError: expected a whole number or null, got True$",
        ),
        (
            as_json(spans=[{"device": "cpu", "op": 1, "start_s": 0, "duration_s": 1}]),
            r"^the timeline is damaged: TypeError: expected a text, got 1$",
        ),
        (as_json(spans=[{"device": "cpu", "op": "F", "start_s": 0, "duration_s": -1}]), r"times must be finite"),
        (
            as_json(spans=[{"device": "cpu", "op": "F", "start_s": "0", "duration_s": 1}]),
            r"^the timeline is damaged: TypeError: ",
        ),
    ],
)
def test_what_is_no_timeline_is_refused(text: str, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        Timeline.from_json(text)
