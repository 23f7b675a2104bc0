"""The timeline for trace viewers."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from lightning_hetero.schedule import TRANSFER, Span, Timeline, chrome_trace

FORWARD = Span(device="cuda:0", op="F", stage=0, micro_batch=3, start_s=100.0, duration_s=0.25)
MOVES = [
    Span(device="cuda:1", op=TRANSFER, stage=1, micro_batch=n, start_s=start_s, duration_s=0.5)
    for n, start_s in enumerate((100.25, 100.5, 100.75))
]


def events(**timelines: Timeline) -> list[dict[str, Any]]:
    trace = json.loads(chrome_trace(timelines))
    assert trace["displayTimeUnit"] == "ms"
    return list(trace["traceEvents"])


def test_a_span_is_a_complete_event_in_microseconds_from_the_first_start() -> None:
    later = Span(device="cuda:0", op="B", stage=0, micro_batch=3, start_s=100.5, duration_s=0.125)
    first, second = (event for event in events(step=Timeline((FORWARD, later))) if event["ph"] == "X")
    assert first == {
        "ph": "X",
        "name": "0F3",
        "cat": "F",
        "pid": 1,
        "tid": 2,
        "ts": 0.0,
        "dur": 250_000.0,
        "args": {"stage": 0, "micro_batch": 3},
    }
    assert (second["ts"], second["dur"]) == (500_000.0, 125_000.0)


def test_transfers_that_overlap_get_rows_of_their_own() -> None:
    found = events(step=Timeline((FORWARD, *MOVES), devices=("cuda:0", "cuda:1")))
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert list(names.values()) == ["cuda:0", "cuda:1", "cuda:1 transfer", "cuda:1 transfer"]
    rows = [event["tid"] for event in found if event["ph"] == "X" and event["cat"] == TRANSFER]
    assert sorted(rows) == [4, 4, 5]


def test_predicted_and_measured_stand_one_below_the_other_each_from_its_own_start() -> None:
    measured = Timeline((Span(device="cuda:0", op="F", stage=0, micro_batch=3, start_s=7.0, duration_s=0.5),))
    found = events(predicted=Timeline((FORWARD,)), measured=measured)
    titles = {event["pid"]: event["args"]["name"] for event in found if event["name"] == "process_name"}
    assert titles == {1: "predicted", 2: "measured"}
    assert [(event["pid"], event["ts"]) for event in found if event["ph"] == "X"] == [(1, 0.0), (2, 0.0)]


def test_no_timeline_is_an_empty_trace() -> None:
    assert events() == []


@given(st.lists(st.tuples(st.floats(0, 1e-4), st.floats(0, 0.1)), max_size=30), st.floats(0, 1e6))
@example([(1.6e-9, 1.6e-9), (0.0, 0.001)], 0.0)
def test_what_follows_does_not_overlap_in_the_whole_nanoseconds_of_a_viewer(
    waits_and_durations: list[tuple[float, float]], start_s: float
) -> None:
    """Perfetto drops an event that begins before the one in front of it has ended."""
    spans, now_s = [], start_s
    for micro_batch, (wait_s, duration_s) in enumerate(waits_and_durations):
        begin_s = now_s + wait_s
        span = Span(device="cuda:0", op="F", stage=0, micro_batch=micro_batch, start_s=begin_s, duration_s=duration_s)
        spans.append(span)
        now_s = span.end_s
    shown = [event for event in events(step=Timeline(tuple(spans))) if event["ph"] == "X"]
    nanoseconds = [(round(event["ts"] * 1e3), round(event["dur"] * 1e3)) for event in shown]
    assert all(begin + taken <= after for (begin, taken), (after, _) in pairwise(nanoseconds))
    assert all(abs(event["dur"] - 1e6 * span.duration_s) < 0.2 for event, span in zip(shown, spans, strict=True))
