"""What no placement can undercut, found without search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.placement.solve.proof import ROUNDING


def least_slowest(seconds: NDArray[np.float64]) -> float:
    """A load below which no placement can bring its slowest device.

    Whatever weights the pieces have, a device that works no longer than T holds a weight of at most T times its best
    weight per second. So T is at least the total weight over the sum of these best rates. Also, every piece stands
    somewhere.

    Args:
        seconds: Of every piece on every device, [device, piece]; infinite where it must not stand.

    Returns:
        The bound in seconds; infinite if some piece may stand nowhere.
    """
    finite = np.isfinite(seconds)
    if not finite.any(axis=0).all():
        return float("inf")
    weight = np.where(finite, seconds, 0.0).sum(axis=0) / finite.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = np.where(weight > 0, weight / seconds, 0.0).max(axis=1)
    harmonic = weight.sum() / rates.sum() if np.isfinite(rates).all() and rates.sum() > 0 else 0.0
    # The weights are sums of rounded numbers; a bound must not be too high by a last digit.
    return float(max(seconds.min(axis=0).max(), harmonic * (1 - ROUNDING)))


def critical_path(seconds: Sequence[float], users: Sequence[Iterable[int]]) -> float:
    """The longest path through a graph: no schedule is faster, however many devices there are.

    Args:
        seconds: Of every node where it is fastest.
        users: For every node, those that wait for it.
    """
    waits = [0] * len(seconds)
    for others in users:
        for other in others:
            waits[other] += 1
    ends = [0.0] * len(seconds)
    free = [node for node, count in enumerate(waits) if not count]
    while free:
        node = free.pop()
        ends[node] += seconds[node]
        for other in users[node]:
            ends[other] = max(ends[other], ends[node])
            waits[other] -= 1
            if not waits[other]:
                free.append(other)
    return max(ends) * (1 - ROUNDING)
