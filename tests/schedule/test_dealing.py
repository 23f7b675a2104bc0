"""Which rows of every batch belong to which process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError, UsageError
from lightning_hetero.schedule.dealing import Dealer, Dealing, Shares

SHARES = st.lists(st.floats(0.01, 100.0) | st.integers(1, 20), min_size=1, max_size=6)
BATCHES = st.lists(st.integers(0, 200), max_size=60)


@given(SHARES, BATCHES)
def test_every_row_has_one_owner_and_every_rank_a_row_if_there_are_enough(
    shares: list[float], batches: list[int]
) -> None:
    dealer = Dealer(shares)
    for rows in batches:
        sizes = dealer.deal(rows)
        assert len(sizes) == len(shares)
        assert sum(sizes) == rows
        assert min(sizes) >= (rows >= len(shares))


@given(SHARES, st.lists(st.integers(1, 200), min_size=1, max_size=200))
def test_the_ranks_come_near_their_shares_in_the_long_run(shares: list[float], batches: list[int]) -> None:
    # Batches that hold a row for the smallest share, or none for everybody: nobody gets a row for being there only.
    whole = sum(shares) / min(shares)
    batches = [rows for rows in batches if rows >= whole + 1 or rows < len(shares)]
    dealer, got, seen = Dealer(shares), [0] * len(shares), 0
    for rows in batches:
        got = [total + size for total, size in zip(got, dealer.deal(rows), strict=True)]
        seen += rows
        for total, share in zip(got, shares, strict=True):
            assert abs(total - seen * share / sum(shares)) < len(shares)


@given(SHARES, st.integers(1, 300), st.integers(1, 30))
def test_a_row_for_being_there_is_not_paid_back(shares: list[float], rows: int, small: int) -> None:
    patient, new = Dealer(shares), Dealer(shares)
    for _ in range(100):
        patient.deal(len(shares) + small % 2)
    for mine, theirs in zip(patient.deal(rows), new.deal(rows), strict=True):
        assert abs(mine - theirs) <= len(shares)


@given(SHARES, BATCHES, SHARES, BATCHES)
def test_equal_shares_and_batches_are_dealt_equally(
    shares: list[float], batches: list[int], later: list[float], more: list[int]
) -> None:
    later = (later * len(shares))[: len(shares)]

    def sizes() -> list[tuple[int, ...]]:
        dealer = Dealer(shares)
        first = [dealer.deal(rows) for rows in batches]
        dealer.change(later)
        return first + [dealer.deal(rows) for rows in more]

    assert sizes() == sizes()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), BATCHES, st.sampled_from([2, 3, 10, 0.1]))
def test_only_the_proportions_of_shares_matter(shares: list[int], batches: list[int], factor: float) -> None:
    one, other = Dealer(shares), Dealer([share * factor for share in shares])
    assert [one.deal(rows) for rows in batches] == [other.deal(rows) for rows in batches]


@pytest.mark.parametrize(
    ("shares", "batches", "sizes"),
    [
        ((1, 3), [1, 1, 1, 1], [(0, 1), (1, 0), (0, 1), (0, 1)]),
        ((1, 1), [3, 3, 3], [(2, 1), (1, 2), (2, 1)]),
        ((1, 1, 1), [1, 1, 1, 2], [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]),
        ((1, 100), [2, 8, 101], [(1, 1), (1, 7), (1, 100)]),
        ((1, 1, 100), [8], [(1, 1, 6)]),
        ((1e-300, 1e300), [5], [(1, 4)]),
        ((2, 1), [0, 3], [(0, 0), (2, 1)]),
    ],
)
def test_examples(shares: tuple[float, ...], batches: list[int], sizes: list[tuple[int, ...]]) -> None:
    dealer = Dealer(shares)
    assert [dealer.deal(rows) for rows in batches] == sizes


def test_new_shares_go_on_from_what_is_owed() -> None:
    dealer = Dealer((1, 1))
    assert dealer.deal(3) == (2, 1)
    dealer.change((3, 3))
    assert dealer.deal(3) == (1, 2)
    dealer.change((1, 3))
    assert dealer.deal(8) == (2, 6)


@pytest.mark.parametrize("shares", [(), (1, 0), (1, -1), (1, float("inf")), (float("nan"),)])
def test_shares_that_cannot_be(shares: tuple[float, ...]) -> None:
    for refused in (Dealer, Shares):
        with pytest.raises(ScheduleError, match=r"every rank needs a finite share above 0, got \("):
            refused(shares)


def test_as_many_shares_as_before() -> None:
    for dealt in (Dealer((1, 2)), Shares((1, 2))):
        arguments = ((1, 2, 3),) if isinstance(dealt, Dealer) else ((1, 2, 3), 4)
        with pytest.raises(ScheduleError, match="2 ranks need 2 shares, got 3"):
            dealt.change(*arguments)
    with pytest.raises(ScheduleError, match="a batch has 0 rows or more, got -1"):
        Dealer((1, 2)).deal(-1)


def test_shares_change_from_a_batch_on() -> None:
    shares = Shares((1, 1))
    ahead, behind = Dealing(shares), Dealing(shares)
    first = [ahead.deal(4) for _ in range(3)]
    shares.change((1, 3), from_batch=4)
    assert first + [ahead.deal(4) for _ in range(3)] == [(2, 2)] * 4 + [(1, 3)] * 2
    assert [behind.deal(4) for _ in range(6)] == [(2, 2)] * 4 + [(1, 3)] * 2
    assert shares.current == (1, 3)
    assert Dealing(shares).deal(4) == (1, 3)


def test_a_later_change_replaces_one_that_has_not_begun() -> None:
    shares = Shares((1, 1))
    dealing = Dealing(shares)
    shares.change((1, 3), from_batch=3)
    shares.change((3, 1), from_batch=1)
    assert [dealing.deal(4) for _ in range(5)] == [(2, 2)] + [(3, 1)] * 4


def test_a_change_that_comes_too_late() -> None:
    shares = Shares((1, 1))
    dealing = Dealing(shares)
    dealing.deal(4)
    dealing.deal(4)
    shares.change((1, 3), from_batch=1)
    with pytest.raises(UsageError, match="from batch 1 on, but 2 batches are dealt already"):
        dealing.deal(4)
