"""Whose turn it is on a device: for threads that wait, and for those who only want to know when they may begin."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from time import perf_counter

MayBegin = Callable[[], bool]
Key = tuple[int, int, int]  # place, call, lane


class Turns:
    """Hands a device from task to task. Of those that wait when it gets free, the lowest that may begin goes first.

    The order is that of (place, call, lane, arrival); see `Worker.submit`. What `may_begin` asks for comes from tasks
    of this device, whose ends are noticed by themselves, or from elsewhere: then somebody has to say `look_again`.

    A task that is about to come may be expected: those that would go after it wait for it, for a while. Nobody wakes
    when that is over: somebody has to say `look_again` now and then.
    """

    def __init__(self) -> None:
        self._expected: dict[tuple[int, int], tuple[Key, float]] = {}  # by call and lane: until when
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: list[tuple[int, int, int, int, Callable[[], object], MayBegin | None]] = []
        self._arrivals = itertools.count()

    def queue(
        self, place: int, call: int, lane: int, begin: Callable[[], object], may_begin: MayBegin | None = None
    ) -> None:
        """Call `begin`, which returns at once, when a task has its turn; in the thread that ends the one before it."""
        with self._lock:
            self._expected.pop((call, lane), None)
            if self._is_taken or (may_begin is not None and not may_begin()) or self._is_early((place, call, lane)):
                heapq.heappush(self._waiting, (place, call, lane, next(self._arrivals), begin, may_begin))
                return
            self._is_taken = True
        begin()

    def take(self, place: int, call: int, lane: int, may_begin: MayBegin | None = None) -> None:
        """Wait for the turn of a task of this thread."""
        with self._lock:
            self._expected.pop((call, lane), None)
            if not self._is_taken and (may_begin is None or may_begin()) and not self._is_early((place, call, lane)):
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            heapq.heappush(self._waiting, (place, call, lane, next(self._arrivals), turn.release, may_begin))
        turn.acquire()

    def take_now(self, place: int, call: int, lane: int, may_begin: MayBegin | None = None) -> bool:
        """Take the turn for a task of this thread if it does not have to wait. Returns whether it has it."""
        with self._lock:
            self._expected.pop((call, lane), None)
            if self._is_taken or (may_begin is not None and not may_begin()) or self._is_early((place, call, lane)):
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

    def expect(self, place: int, call: int, lane: int, until_s: float) -> None:
        """Let tasks that would go after this one wait until it comes, or until a moment of `perf_counter`."""
        with self._lock:
            self._expected[call, lane] = (place, call, lane), until_s

    def expect_no_more(self, call: int, lane: int) -> None:
        """It does not come."""
        with self._lock:
            self._expected.pop((call, lane), None)
        self.look_again()

    def _is_early(self, key: Key) -> bool:
        """Whether a task that goes before this one is expected."""
        if not self._expected:
            return False
        now_s = perf_counter()
        self._expected = {of: each for of, each in self._expected.items() if each[1] > now_s}
        return any(other < key for other, _ in self._expected.values())

    def _next(self) -> Callable[[], object] | None:
        """Take the lowest task that may begin out of those that wait."""
        held = []
        found = None
        while self._waiting and found is None:
            task = heapq.heappop(self._waiting)
            place, call, lane, _, begin, may_begin = task
            if may_begin is None or may_begin():
                if self._is_early((place, call, lane)):
                    held.append(task)
                    break
                found = begin
            else:
                held.append(task)
        for task in held:
            heapq.heappush(self._waiting, task)
        return found
