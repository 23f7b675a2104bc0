"""Measures how long something takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_MOST_REPETITIONS = 15
_ENOUGH_S = 0.06
_LONG_S = 1.0


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done all it was told; the CPU never waits."""
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).synchronize(device)


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of `work` on a device, and what it returned."""
    synchronize(device)
    begun_s = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - begun_s, result


def medians(once: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The median of each of the seconds that `once` returns, over few calls of it, the first one left out.

    What takes long is repeated less: one call of some milliseconds says more than five of some microseconds. After a
    very long first call there is no second one.
    """
    first = once()
    if sum(first) > _LONG_S:
        return first
    found: list[tuple[float, ...]] = []
    while len(found) < _MOST_REPETITIONS and (not found or sum(map(sum, found)) < _ENOUGH_S):
        found.append(once())
    return tuple(statistics.median(column) for column in zip(*found, strict=True))
