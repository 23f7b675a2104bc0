"""Measures how long something takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

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


class Clock:
    """Moments in the work of a device, to be told apart later.

    Where the device works by itself, a moment is an event among its work, and nobody waits for it: in a step, the CPU
    prepares the next work meanwhile. Work that takes longer to prepare than to do lasts as long as its preparation.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device) if works_by_itself(device) else None

    def now(self) -> Any:
        """When all that this thread has told the device is done."""
        if self._module is None:
            synchronize(self._device)
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self._device))
        return event

    def between(self, begun: Any, ended: Any) -> float:
        """Seconds from one moment to another; waits for the later one."""
        if self._module is None:
            return float(ended - begun)
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3


def works_by_itself(device: torch.device) -> bool:
    """Whether calls return before the device has done the work, and events tell when it has."""
    return device.type in ("cuda", "xpu")


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
