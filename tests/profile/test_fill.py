"""Estimates from what was measured, with numbers that one can follow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.profile import Curve
from lightning_hetero.profile.benches import Bench
from lightning_hetero.profile.fill import Pair, add_curves, fill

CPU, GPU = Bench("cpu"), Bench("cuda:0")


def pair(forward_s: float) -> Pair:
    """A unit that takes so long with 8 rows, and twice that for its backward."""
    return Curve(((1, forward_s / 2), (8, forward_s))), Curve(((1, forward_s), (8, 2 * forward_s)))


def test_what_is_missing_on_a_bench_compares_as_the_others_do() -> None:
    measured = {"a": {CPU: pair(4.0), GPU: pair(1.0)}, "b": {CPU: pair(8.0), GPU: pair(2.0)}, "c": {CPU: pair(40.0)}}
    full = fill(measured, {"a": 1.0, "b": 1.0, "c": 1.0}, (CPU, GPU), rows=8)

    assert full is not None
    assert full["c"] == {CPU: pair(40.0), GPU: pair(10.0)}
    assert {sort: full[sort] for sort in "ab"} == {sort: measured[sort] for sort in "ab"}


def test_what_was_measured_nowhere_takes_as_long_by_byte_as_the_rest() -> None:
    measured: dict[str, dict[Bench, Pair]] = {"a": {CPU: pair(4.0)}, "b": {CPU: pair(8.0)}, "c": {}}
    full = fill(measured, {"a": 10.0, "b": 20.0, "c": 90.0}, (CPU,), rows=8)

    assert full is not None
    assert full["c"] == {CPU: pair(36.0)}


def test_benches_without_a_unit_in_common_count_as_equal() -> None:
    full = fill({"a": {CPU: pair(4.0)}, "b": {GPU: pair(2.0)}}, {"a": 1.0, "b": 1.0}, (CPU, GPU), rows=8)

    assert full == {"a": {CPU: pair(4.0), GPU: pair(4.0)}, "b": {CPU: pair(2.0), GPU: pair(2.0)}}


def test_of_nothing_nothing_follows() -> None:
    assert fill({"a": {}, "b": {}}, {"a": 1.0, "b": 1.0}, (CPU, GPU), rows=8) is None


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.integers(1, 99), st.floats(0, 100), min_size=2, max_size=4).map(
            lambda points: Curve(tuple(sorted(points.items())))
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_sum_of_curves_is_their_sum_where_they_were_measured(curves: list[Curve]) -> None:
    total = add_curves(curves)

    for rows, seconds in total.points:
        assert seconds == pytest.approx(sum(curve(rows) for curve in curves))
    assert {rows for rows, _ in total.points} == {rows for curve in curves for rows, _ in curve.points}
