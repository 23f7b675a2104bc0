"""Whose turn it is on a device: for threads that wait, and for those who only want to know when they may begin."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

MayBegin = Callable[[], bool]


class Turns:
    """Hands a device from task to task. Of those that wait when it gets free, the lowest that may begin goes first.

    The order is that of (place, call, lane, arrival); see `Worker.submit`. What `may_begin` asks for comes from tasks
    of this device, whose ends are noticed by themselves, or from elsewhere: then somebody has to say `look_again`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: list[tuple[int, int, int, int, Callable[[], object], MayBegin | None]] = []
        self._arrivals = itertools.count()

    def queue(
        self, place: int, call: int, lane: int, begin: Callable[[], object], may_begin: MayBegin | None = None
    ) -> None:
        """Call `begin`, which returns at once, when a task has its turn; in the thread that ends the one before it."""
        with self._lock:
            if self._is_taken or (may_begin is not None and not may_begin()):
                heapq.heappush(self._waiting, (place, call, lane, next(self._arrivals), begin, may_begin))
                return
            self._is_taken = True
        begin()

    def take(self, place: int, call: int, lane: int, may_begin: MayBegin | None = None) -> None:
        """Wait for the turn of a task of this thread."""
        with self._lock:
            if not self._is_taken and (may_begin is None or may_begin()):
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            heapq.heappush(self._waiting, (place, call, lane, next(self._arrivals), turn.release, may_begin))
        turn.acquire()

    def take_now(self, may_begin: MayBegin | None = None) -> bool:
        """Take the turn for a task of this thread if it does not have to wait. Returns whether it has it."""
        with self._lock:
            if self._is_taken or (may_begin is not None and not may_begin()):
                return False
            self._is_taken = True
            return True

    def pass_on(self) -> None:
        """End a turn."""
        with self._lock:
            begin = self._next() if self._waiting else None
            if begin is None:
                self._is_taken = False
                return
        begin()

    def look_again(self) -> None:
        """Begin with a task that may begin now, and might not before."""
        if not self._waiting:  # whoever comes later looks for himself
            return
        with self._lock:
            begin = None if self._is_taken else self._next()
            if begin is None:
                return
            self._is_taken = True
        begin()

    def _next(self) -> Callable[[], object] | None:
        """Take the lowest task that may begin out of those that wait."""
        held = []
        found = None
        while self._waiting and found is None:
            task = heapq.heappop(self._waiting)
            *_, begin, may_begin = task
            if may_begin is None or may_begin():
                found = begin
            else:
                held.append(task)
        for task in held:
            heapq.heappush(self._waiting, task)
        return found
