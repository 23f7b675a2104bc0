"""Lets micro-batches pass one after the other where their order matters."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

_LOOK_AGAIN_S = 0.05  # how soon a waiting lane notices that another one has failed


class Turnstile:
    """For every key, lets the n-th passage of a lane begin when all lower lanes are done with theirs.

    Lanes start in order and no lane waits for a higher one, so the lowest lane under way never waits.

    Args:
        lanes: How many.
        check: Called while waiting; raises if the lane is to stop.
    """

    def __init__(self, lanes: int, check: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._passed: list[Counter[Hashable]] = [Counter() for _ in range(lanes)]
        self._ended = [False] * lanes
        self._inside: list[set[Hashable]] = [set() for _ in range(lanes)]
        self._check = check

    @contextmanager
    def passing(self, lane: int, key: Hashable) -> Iterator[None]:
        """Within the block, lane `lane` is alone with `key`, and in order. A passage within a passage is free."""
        if key in self._inside[lane]:
            yield
            return
        turn = self._passed[lane][key]
        with self._changed:
            while not all(self._ended[other] or self._passed[other][key] > turn for other in range(lane)):
                self._changed.wait(_LOOK_AGAIN_S)
                self._check()
        self._inside[lane].add(key)
        try:
            yield
        finally:
            self._inside[lane].discard(key)
            with self._changed:
                self._passed[lane][key] += 1
                self._changed.notify_all()

    def end(self, lane: int) -> None:
        """The lane will not come again."""
        with self._changed:
            self._ended[lane] = True
            self._changed.notify_all()
