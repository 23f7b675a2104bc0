"""How a batch is split into micro-batches, and how these are dealt out to the devices of a replicated stage.

The runtime and its prediction both obey these rules.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.errors import ScheduleError


def split_rows(rows: int, parts: int, weights: Sequence[float] = ()) -> list[int]:
    """Sizes of micro-batches, fewer than `parts` if there are fewer rows; none is empty.

    Args:
        rows: Rows of the batch.
        parts: How many micro-batches there are to be.
        weights: Their shares of the rows, of any sum, by the method of the largest remainder; none: as equal as can
            be, the larger ones first.

    Raises:
        ScheduleError: The weights are not as many as the micro-batches, or one of them is not above 0.

    Example:
        >>> split_rows(10, 4)
        [3, 3, 2, 2]
        >>> split_rows(10, 2, (3, 1))
        [8, 2]
    """
    if not weights:
        parts = max(1, min(parts, rows))
        return [rows // parts + (index < rows % parts) for index in range(parts)]
    if len(weights) != parts:
        raise ScheduleError(f"{parts} micro-batches need {parts} weights, got {len(weights)}: {tuple(weights)}")
    if not all(weight > 0 for weight in weights):
        raise ScheduleError(f"every micro-batch needs a weight above 0, got {tuple(weights)}")
    total = sum(weights)
    quotas = [rows * weight / total for weight in weights]
    sizes = [int(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(parts), key=lambda index: (round(sizes[index] - quotas[index], 9), index))
    for index in by_remainder[: rows - sum(sizes)]:
        sizes[index] += 1
    return [size for size in sizes if size] or [rows]


def deal(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Which replica gets which micro-batch: the largest first, each to the one that would be done with it soonest.

    Longest processing time first, for machines of unequal speed (Gonzalez, Ibarra and Sahni, "Bounds for LPT schedules
    on uniform processors", 1977).

    Args:
        sizes: Rows of each micro-batch.
        shares: How much each replica gets, in proportion to the others; all above 0.

    Returns:
        Index of a replica for each micro-batch.

    Example:
        >>> deal([2, 2, 2, 2], (3, 1))
        [0, 0, 1, 0]
    """
    got = [0] * len(shares)
    result = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        soonest = min(
            range(len(shares)),
            key=lambda replica: (round((got[replica] + size) / shares[replica], 9), got[replica], replica),
        )
        got[soonest] += size
        result[index] = soonest
    return result
