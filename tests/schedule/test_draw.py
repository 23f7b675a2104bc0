"""The timeline in a terminal."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_hetero.schedule import TRANSFER, Span, Timeline, draw


def work(device: str, *spans: tuple[str, float, float], stage: int | None = None) -> tuple[Span, ...]:
    """Spans from texts such as "F0"."""
    return tuple(
        Span(
            device=device,
            op=text.rstrip("0123456789"),
            micro_batch=int(text[-1]) if text[-1].isdigit() else None,
            start_s=start_s,
            duration_s=duration_s,
            stage=stage,
        )
        for text, start_s, duration_s in spans
    )


def test_every_device_has_a_row_with_its_busy_share() -> None:
    timeline = Timeline(
        work("cuda:0", ("F0", 0, 1), ("F1", 1, 1), ("B0", 5, 2), ("B1", 8, 2))
        + work("cuda:1", ("F0", 1.5, 1), ("B0", 2.5, 2), ("F1", 4.5, 1), ("B1", 5.5, 2))
        + work("cuda:1", (f"{TRANSFER}0", 1, 0.5), (f"{TRANSFER}1", 2, 0.5)),
        devices=("cuda:0", "cuda:1", "cpu"),
    )
    assert draw(timeline, width=40).splitlines() == [
        "cuda:0  F0──F1──············B0──────····B1──────   60 %",
        "cuda:1  ····~~F0──B0──────F1──B1──────··········   60 %",
        "cpu     ········································    0 %",
        "10 s, bubble 60 %",
    ]


def test_a_device_with_several_stages_says_which() -> None:
    timeline = Timeline(work("cpu", ("F0", 0, 1), stage=0) + work("cpu", ("F0", 1, 1), ("optimizer", 2, 2), stage=1))
    assert draw(timeline, width=16).splitlines()[0] == "cpu  0F0─1F0─1O──────  100 %"


def test_a_number_without_room_is_left_out() -> None:
    timeline = Timeline(work("cpu", ("F8", 0, 1), ("F9", 1, 1), ("B8", 2, 6)))
    assert draw(timeline, width=8).splitlines()[0] == "cpu  FFB8────  100 %"


def test_the_shortest_span_is_seen() -> None:
    assert (
        draw(Timeline(work("cpu", ("F0", 0, 1e-9), ("B0", 5, 5))), width=10).splitlines()[0].startswith("cpu  F····B0")
    )
    assert (
        draw(Timeline(work("cpu", ("F0", 0, 10), ("B0", 10, 1e-9))), width=10)
        .splitlines()[0]
        .endswith("F0───────B  100 %")
    )


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw(Timeline(devices=("cpu",)), width=4) == "cpu  ····    0 %\n0 s, bubble 0 %"
    assert draw(Timeline()) == "0 s, bubble 0 %"


@pytest.mark.parametrize(("duration_s", "text"), [(83, "83 s"), (0.0125, "12.5 ms"), (2e-6, "2 us")])
def test_times_have_the_unit_that_suits_them(duration_s: float, text: str) -> None:
    assert draw(Timeline(work("cpu", ("F0", 3, duration_s)))).splitlines()[-1] == f"{text}, bubble 0 %"


@settings(deadline=None)
@example(durations=[5e-324], gaps=[0.0], width=1)
@given(
    durations=st.lists(st.floats(0, 9), max_size=9),
    gaps=st.lists(st.floats(0, 9), min_size=9, max_size=9),
    width=st.integers(1, 99),
)
def test_every_row_is_as_wide_as_asked(durations: list[float], gaps: list[float], width: int) -> None:
    now_s, spans = 0.0, []
    for number, (duration_s, gap_s) in enumerate(zip(durations, gaps, strict=False)):
        spans.append((f"F{number}", now_s + gap_s, duration_s))
        now_s += gap_s + duration_s
    row, *_ = draw(Timeline(work("cpu", *spans), devices=("cpu",)), width=width).splitlines()
    assert len(row) == len("cpu  ") + width + len("  100 %")
