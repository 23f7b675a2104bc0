"""Counts what goes from device to device, while somebody wants to know."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Meter:
    """What was moved within `metering`.

    Attributes:
        moved_bytes: Of all tensors, each counted as often as it moved. Between two kinds of accelerators it counts
            once, though it goes through host memory.
    """

    def __init__(self) -> None:
        self.moved_bytes = 0
        self._lock = threading.Lock()  # the devices' workers move at the same time

    def count(self, moved: Tensor) -> None:
        """A tensor has moved; its gradient will go the way back, if there is one."""
        self._add(moved)
        if moved.requires_grad:
            moved.register_hook(self._add)

    def _add(self, tensor: Tensor) -> None:
        with self._lock:
            self.moved_bytes += tensor.numel() * tensor.element_size()


running: list[Meter] = []
"""Those that count now."""


@contextmanager
def metering() -> Iterator[Meter]:
    """Within the block, count the bytes of tensors that the runtime moves between devices, on all threads."""
    meter = Meter()
    running.append(meter)
    try:
        yield meter
    finally:
        running.remove(meter)
