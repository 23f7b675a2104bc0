"""Shares that follow measured speeds, and do not swing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.schedule.rebalance import LEAST_GAIN, rebalanced

positive = st.floats(0.01, 100)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6))
def test_new_shares_let_all_be_done_at_once(ranks: list[tuple[float, float]]) -> None:
    shares, s_per_row = zip(*ranks, strict=True)
    new = rebalanced(shares, s_per_row)
    if new is None:
        return
    assert math.fsum(new) == pytest.approx(1)
    ends_s = [share * seconds for share, seconds in zip(new, s_per_row, strict=True)]
    assert ends_s == pytest.approx([ends_s[0]] * len(ends_s))
    before_s = max(share / sum(shares) * seconds for share, seconds in ranks)
    assert ends_s[0] <= (1 - LEAST_GAIN) * before_s
    assert rebalanced(new, s_per_row) is None


@given(st.lists(positive, min_size=1, max_size=6), st.floats(0.96, 1.04))
def test_small_deviations_change_nothing(s_per_row: list[float], noise: float) -> None:
    shares = [1 / seconds for seconds in s_per_row]
    assert rebalanced(shares, [s_per_row[0] * noise, *s_per_row[1:]]) is None


@pytest.mark.parametrize("unknown", [0.0, math.inf, math.nan, -1.0])
def test_nothing_is_changed_where_somebody_was_not_measured(unknown: float) -> None:
    assert rebalanced((1, 1), (0.1, unknown)) is None
