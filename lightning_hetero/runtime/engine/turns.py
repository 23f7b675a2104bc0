"""Who may work for a device: one at a time, and of those who wait the one whose task comes first."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable


class Turns:
    """Hands a device from task to task. Of the tasks that wait when it gets free, the lowest goes first.

    The order is that of (place, call, lane, arrival); see `Worker.submit`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: list[tuple[int, int, int, int, Callable[[], object]]] = []
        self._arrivals = itertools.count()

    def queue(self, place: int, call: int, lane: int, begin: Callable[[], object]) -> None:
        """Call `begin`, which returns at once, when a task has its turn; in the thread that ends the one before it."""
        with self._lock:
            if self._is_taken:
                heapq.heappush(self._waiting, (place, call, lane, next(self._arrivals), begin))
                return
            self._is_taken = True
        begin()

    def take(self, place: int, call: int, lane: int) -> None:
        """Wait for the turn of a task of this thread."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            heapq.heappush(self._waiting, (place, call, lane, next(self._arrivals), turn.release))
        turn.acquire()

    def pass_on(self) -> None:
        """End a turn."""
        with self._lock:
            if not self._waiting:
                self._is_taken = False
                return
            begin = heapq.heappop(self._waiting)[-1]
        begin()
