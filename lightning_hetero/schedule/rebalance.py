"""When it pays to share a batch anew among processes that are not as fast as was thought."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

LEAST_GAIN = 0.1
"""Part of a step that a change has to save: below, the measurement may be wrong, and shares would swing."""


def rebalanced(
    shares: Sequence[float], s_per_row: Sequence[float], least_gain: float = LEAST_GAIN
) -> tuple[float, ...] | None:
    """Shares by which all processes are done at the same time; None if the present ones are as good.

    Args:
        shares: How much of a batch each process gets now, in proportion to the others.
        s_per_row: Seconds that each process works on a row, without those in which it waits for others.
        least_gain: Part of the time of a step that the change has to save.

    Returns:
        Shares that add up to 1.

    Example:
        >>> rebalanced((1, 1), (0.3, 0.1))
        (0.25, 0.75)
        >>> rebalanced((1, 3), (0.3, 0.1)) is None
        True
    """
    if not all(isfinite(seconds) and seconds > 0 for seconds in s_per_row):
        return None
    total = sum(shares)
    now_s = max(share / total * seconds for share, seconds in zip(shares, s_per_row, strict=True))
    speeds = [1 / seconds for seconds in s_per_row]
    best_s = 1 / sum(speeds)
    if best_s > (1 - least_gain) * now_s:
        return None
    return tuple(speed / sum(speeds) for speed in speeds)
