"""How rows are split into micro-batches, and how micro-batches are dealt out to replicas."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.rows import deal, split_rows

SHARES = st.lists(st.floats(0.05, 20.0) | st.integers(1, 20), min_size=1, max_size=5)


@given(st.integers(1, 500), st.integers(1, 20))
def test_equal_parts_differ_by_one_row_at_most(rows: int, parts: int) -> None:
    sizes = split_rows(rows, parts)
    assert sum(sizes) == rows
    assert len(sizes) == min(rows, parts)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 500), SHARES)
def test_weighted_parts_are_less_than_a_row_off_their_quota(rows: int, weights: list[float]) -> None:
    sizes = split_rows(rows, len(weights), weights)
    quotas = [rows * weight / sum(weights) for weight in weights]
    assert sum(sizes) == rows
    assert min(sizes) >= 1
    assert len(sizes) <= len(weights)
    if min(quotas) >= 1:
        assert len(sizes) == len(weights)
        assert all(abs(size - quota) < 1 + 1e-6 for size, quota in zip(sizes, quotas, strict=True))


@given(st.integers(1, 50), SHARES, st.floats(0.01, 100.0))
def test_only_the_proportions_of_weights_matter(rows: int, weights: list[float], factor: float) -> None:
    whole = [round(weight) for weight in weights if weight >= 1] or [1]
    assert split_rows(rows, len(whole), whole) == split_rows(rows, len(whole), [weight * factor for weight in whole])


def test_equal_weights_are_no_weights() -> None:
    for rows, parts in product(range(1, 30), range(1, 8)):
        assert split_rows(rows, parts, [0.3] * parts) == split_rows(rows, parts)


@pytest.mark.parametrize(
    ("rows", "weights", "sizes"),
    [
        (16, (3, 1), [12, 4]),
        (10, (3, 1), [8, 2]),  # 7.5 and 2.5: of equal remainders, the first gets the row
        (2, (3, 1), [2]),  # 1.5 and 0.5, likewise: nothing is left for the second
        (1, (1, 3), [1]),
        (7, (1, 1, 1), [3, 2, 2]),
        (5, (1, 100, 1), [5]),
        (3, (0.1, 0.1, 0.1), [1, 1, 1]),
    ],
)
def test_the_largest_remainders_get_the_rows_that_are_left(
    rows: int, weights: tuple[float, ...], sizes: list[int]
) -> None:
    assert split_rows(rows, len(weights), weights) == sizes


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, 2), r"3 micro-batches need 3 weights, got 2: \(1, 2\)"),
        ((1, 0, 2), r"every micro-batch needs a weight above 0, got \(1, 0, 2\)"),
        ((1, -1, 2), r"every micro-batch needs a weight above 0, got \(1, -1, 2\)"),
        ((1, float("nan"), 2), r"every micro-batch needs a weight above 0, got \(1, nan, 2\)"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        split_rows(10, 3, weights)


@given(st.lists(st.integers(1, 30), max_size=12), SHARES)
def test_every_micro_batch_is_dealt_to_one_replica(sizes: list[int], shares: list[float]) -> None:
    dealt = deal(sizes, shares)
    assert len(dealt) == len(sizes)
    assert set(dealt) <= set(range(len(shares)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 9), st.randoms())
def test_micro_batches_as_large_as_shares_go_to_one_replica_each(shares: list[int], times: int, random: object) -> None:
    random.shuffle(shares)  # type: ignore[attr-defined]
    sizes = split_rows(sum(shares) * times, len(shares), shares)
    assert sizes == [share * times for share in shares]
    dealt = deal(sizes, shares)
    assert sorted(dealt) == list(range(len(shares)))
    assert [shares[replica] for replica in dealt] == shares


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_equal_replicas_get_equally_many_equal_micro_batches(replicas: int, each: int, rows: int) -> None:
    dealt = deal([rows] * (replicas * each), [1.0] * replicas)
    assert [dealt.count(replica) for replica in range(replicas)] == [each] * replicas


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_the_last_replica_is_done_within_the_bound_of_lpt(sizes: list[int], speeds: list[int]) -> None:
    def ends(dealt: tuple[int, ...] | list[int]) -> float:
        work = [0.0] * len(speeds)
        for size, replica in zip(sizes, dealt, strict=True):
            work[replica] += size / speeds[replica]
        return max(work)

    best = min(map(ends, product(range(len(speeds)), repeat=len(sizes))))
    bound = 2 * len(speeds) / (len(speeds) + 1)
    assert ends(deal(sizes, speeds)) <= bound * best + 1e-9


@given(st.lists(st.integers(1, 12), max_size=8), SHARES, st.floats(0.01, 100.0))
def test_a_deal_is_the_same_every_time(sizes: list[int], shares: list[float], factor: float) -> None:
    assert deal(sizes, shares) == deal(tuple(sizes), tuple(shares))


def test_a_replica_too_slow_for_its_rounded_part_leaves_it_to_the_others() -> None:
    assert split_rows(8, 2, (10, 1)) == [7, 1]
    assert deal([7, 1], (10, 1)) == [0, 0]  # 0.8 instead of 1.0
