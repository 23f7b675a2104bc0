"""Lets micro-batches pass one after the other where their order matters: as if each came after the end of the last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable, Iterator
from contextlib import contextmanager

from lightning_hetero.runtime.engine.cut import CannotCutError

_LOOK_AGAIN_S = 0.05  # how soon a waiting lane notices that another one has failed


class Turnstile:
    """For every key, lets a lane pass when all lower lanes have passed for the last time.

    That is when they have ended; or when they have passed once, where it is known that nobody passes again. Lanes start
    in order and no lane waits for a higher one, so the lowest lane under way never waits.

    Args:
        lanes: How many.
        check: Called while waiting; raises if the lane is to stop.
        once: The keys that each lane passes once.
    """

    def __init__(self, lanes: int, check: Callable[[], None], once: Container[Hashable] = ()) -> None:
        self._changed = threading.Condition()
        self._once = once
        self._passed: list[set[Hashable]] = [set() for _ in range(lanes)]
        self._ended = [False] * lanes
        self._inside: list[set[Hashable]] = [set() for _ in range(lanes)]
        self._check = check

    @contextmanager
    def passing(self, lane: int, key: Hashable, name: str) -> Iterator[None]:
        """Within the block, lane `lane` is alone with `key`, and in order. A passage within a passage is free.

        Args:
            lane: Index of the lane.
            key: What it passes.
            name: What that is called.

        Raises:
            CannotCutError: The lane passes again what it was to pass once, so others may have passed before it.
        """
        if key in self._inside[lane]:
            yield
            return
        if key in self._passed[lane] and key in self._once and lane + 1 < len(self._passed):
            raise CannotCutError(f"it calls {name} more than once, whose calls have to keep their order")
        with self._changed:
            while not all(self._is_done(other, key) for other in range(lane)):
                self._changed.wait(_LOOK_AGAIN_S)
                self._check()
        self._inside[lane].add(key)
        try:
            yield
        finally:
            self._inside[lane].discard(key)
            with self._changed:
                self._passed[lane].add(key)
                self._changed.notify_all()

    def _is_done(self, lane: int, key: Hashable) -> bool:
        return self._ended[lane] or (key in self._once and key in self._passed[lane])

    def end(self, lane: int) -> None:
        """The lane will not come again."""
        with self._changed:
            self._ended[lane] = True
            self._changed.notify_all()
