"""Times short work on a device so that other programs on the machine do not count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

FEWEST_REPETITIONS = 5
"""In each of the two passes, so at least ten in all."""
_MOST_REPETITIONS = 200
_PASS_S = 0.02

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """The shortest of all repetitions.

    Attributes:
        best_s: Seconds; whatever else the machine did can only have made the others longer.
        spread: How far the shortest repetitions of the two best passes are apart, as a share of the shorter. Passes
            lie far apart in time, so this tells how far `best_s` may be off: a second pass has confirmed it so far.
    """

    best_s: float
    spread: float

    @classmethod
    def of_passes(cls, shortest_s: Iterable[float]) -> Timing:
        """The timing from the shortest repetition of each of at least two passes."""
        best_s, second_s, *_ = sorted(shortest_s)
        return cls(best_s, second_s / best_s - 1)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done all it was told; the CPU never waits."""
    if device.type == "cpu":
        return
    wait = torch.get_device_module(device.type).synchronize
    if device.type == "mps":  # there is one, and it takes no argument
        wait()
    else:
        wait(device)


def seconds(work: Work, devices: Iterable[torch.device]) -> float:
    """How long `work` takes once, from idle devices to idle devices."""
    on = tuple(devices)
    for device in on:
        synchronize(device)
    begun_s = time.perf_counter()
    work()
    for device in on:
        synchronize(device)
    # A clock that has not ticked since is no reason to divide by zero.
    return max(time.perf_counter() - begun_s, 1e-9)


def shortest_s(work: Work, devices: Iterable[torch.device]) -> float:
    """The shortest of at least `FEWEST_REPETITIONS` repetitions, after one that does not count."""
    on = tuple(devices)
    work()  # loads kernels and fills caches
    found: list[float] = []
    while len(found) < FEWEST_REPETITIONS or (sum(found) < _PASS_S and len(found) < _MOST_REPETITIONS):
        found.append(seconds(work, on))
    return min(found)


@contextmanager
def intra_op_threads(threads: int | None) -> Iterator[None]:
    """Let the CPU work with so many threads; None leaves torch's setting alone."""
    before = torch.get_num_threads()
    if threads in (None, before):
        yield  # to set the same number is not harmless: MKL would no longer adapt its own
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
