"""What is timed to know a device or a link: each probe is short work of a size that suits the hardware."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch

from lightning_hetero.devices.probe_data import copy_of, filled, growing
from lightning_hetero.devices.stopwatch import Work, seconds, shortest_s

_LONG_PRODUCT_S = 1e-3  # far above what it costs to start work on any device
_LONG_COPY_S = 5e-4  # sooner reached, and what it costs to start is subtracted
_TRIES = 6
_CALLS = 100


class Probe(ABC):
    """Work that can be timed again and again; what it needs is made for each pass and let go after it."""

    def __init__(self, *devices: torch.device) -> None:
        self.devices = devices

    def shortest_s(self) -> float:
        """Seconds of the shortest repetition of one pass."""
        return shortest_s(self.work(), self.devices)

    @abstractmethod
    def work(self) -> Work:
        """The work, ready to start."""


class Sized(Probe):
    """Work that grows until it takes a while, since short work shows what it costs to start and not the rate.

    Args:
        devices: Where it runs.
        sizes: To choose from, growing; the last is taken if none takes long enough.
        long_enough_s: What is meant by a while.
    """

    def __init__(self, *devices: torch.device, sizes: tuple[int, ...], long_enough_s: float) -> None:
        super().__init__(*devices)
        self._sizes = sizes
        self._long_enough_s = long_enough_s

    @abstractmethod
    def work_of(self, size: int) -> Work:
        """The work of a size, ready to start."""

    @cached_property
    def size(self) -> int:
        """The smallest size that takes long enough, or the largest one. Both passes have the same."""
        for size in self._sizes[:-1]:
            work = self.work_of(size)
            work()
            # Some tries may have been interrupted, and would stop the growth too early.
            if all(seconds(work, self.devices) >= self._long_enough_s for _ in range(_TRIES)):
                return size
        return self._sizes[-1]

    def work(self) -> Work:
        """The work of the size that suits."""
        return self.work_of(self.size)


class MatrixProduct(Sized):
    """The product of two square matrices."""

    def __init__(self, device: torch.device, dtype: torch.dtype, memory_bytes: int) -> None:
        largest = max(64, math.isqrt(memory_bytes // (3 * dtype.itemsize)))
        super().__init__(device, sizes=growing(64, min(8192, largest)), long_enough_s=_LONG_PRODUCT_S)
        self._dtype = dtype

    @property
    def operations(self) -> int:
        """Floating-point operations: a multiplication and an addition for each triple of indices."""
        return 2 * self.size**3

    def work_of(self, size: int) -> Work:
        """The product of two `size` × `size` matrices."""
        left = filled(size * size, self._dtype, self.devices[0]).view(size, size)
        right = left.t().contiguous()
        out = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=out)


class MemoryCopy(Sized):
    """A copy within one device."""

    def __init__(self, device: torch.device, memory_bytes: int) -> None:
        # From 32 MiB on, which is beyond most caches.
        super().__init__(
            device, sizes=growing(2**25, max(64, min(2**28, memory_bytes // 2))), long_enough_s=_LONG_COPY_S
        )

    @property
    def moved_bytes(self) -> int:
        """What is read and what is written."""
        return 2 * self.size

    def work_of(self, size: int) -> Work:
        """A copy of `size` bytes."""
        return copy_of(filled(size // 4, torch.float32, self.devices[0]), self.devices[0])


class Launch(Probe):
    """One small operation, of many in a row."""

    calls = _CALLS

    def work(self) -> Work:
        """Additions to a single number."""
        number = torch.zeros((), device=self.devices[0])

        def add() -> None:
            for _ in range(_CALLS):
                number.add_(1)

        return add


class Latency(Probe):
    """A transfer of a single number."""

    def work(self) -> Work:
        """The transfer, from the first to the second device."""
        return copy_of(filled(1, torch.float32, self.devices[0]), self.devices[1])


class Transfer(Sized):
    """A transfer of many bytes, from the first to the second device.

    Args:
        source: Where the bytes are.
        target: Where they go.
        memory_bytes: What the probe may use on either.
        pinned: Whether the host's side is page-locked. Only where one end is the host.
    """

    def __init__(self, source: torch.device, target: torch.device, memory_bytes: int, *, pinned: bool) -> None:
        sizes = growing(2**22, max(64, min(2**26, memory_bytes)), factor=4)
        super().__init__(source, target, sizes=sizes, long_enough_s=_LONG_COPY_S)
        self._pinned = pinned

    def work_of(self, size: int) -> Work:
        """A transfer of `size` bytes."""
        source, target = self.devices
        return copy_of(filled(size // 4, torch.float32, source), target, pinned=self._pinned)


def supported(make: Callable[[], Probe]) -> Probe | None:
    """The probe, once it has run; None if the device cannot do that, for example in this dtype."""
    try:
        probe = make()
        seconds(probe.work(), probe.devices)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # each backend refuses in its own way
        return None
    return probe
