"""Notices that something of a run does not end which the engine's own limits do not cover."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

from lightning_hetero.errors import HangError
from lightning_hetero.runtime.engine.faults import hang, is_debugged

_GRACE = 1.5  # what is cut into micro-batches has the limit itself, and knows better what hangs


class Watchdog:
    """Ends what takes too long in the main thread, with the stacks of all threads on stderr.

    A thread looks at the clock, and interrupts the main thread by SIGINT, as Ctrl-C would; this wakes it if it waits
    for a lock, a file or a socket. Inside of C code that looks for no signals it can only say so. In other threads than
    the main one nothing is watched, as no signal gets there.

    Args:
        timeout_s: What a cut call may take; anything else may take half as much again.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = _GRACE * timeout_s
        self._deadline_s = float("inf")
        self._doing, self._limit_s = "", 0.0
        self._error: HangError | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="hetero-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._is_over.set()
        self._thread.join()

    @contextmanager
    def over(self, doing: str, more_s: float = 0.0) -> Iterator[None]:
        """Watch over the block.

        Args:
            doing: What it does, for the message.
            more_s: Seconds that it may take in any case, on top of the limit.

        Raises:
            HangError: It took longer than it may.
        """
        before: Any = None
        if threading.current_thread() is threading.main_thread() and self._deadline_s == float("inf"):
            before = signal.getsignal(signal.SIGINT)
        if before is None:  # it is watched already, or nobody could put back what C code has set
            yield
            return

        def interrupted(number: int, frame: FrameType | None) -> None:
            error, self._error = self._error, None
            if error is not None:
                raise error
            if callable(before):
                before(number, frame)
            elif before == signal.SIG_DFL:  # which ends the program
                signal.signal(signal.SIGINT, before)
                signal.raise_signal(number)

        self._doing, self._limit_s = doing, self._timeout_s + more_s
        try:
            signal.signal(signal.SIGINT, interrupted)
            self._deadline_s = monotonic() + self._limit_s
            yield
        finally:
            try:
                with self._lock:  # in which the signal may come
                    self._deadline_s = float("inf")
            finally:
                if signal.getsignal(signal.SIGINT) is interrupted:  # and not what user code has set in the block
                    signal.signal(signal.SIGINT, before)

    def _look(self) -> None:
        while not self._is_over.wait(min(1.0, self._timeout_s / 8)):
            with self._lock:
                if monotonic() >= self._deadline_s and not is_debugged(threading.main_thread()):
                    self._deadline_s = float("inf")
                    self._error = hang(self._doing, self._limit_s, "It ran in the main thread.")
                    _interrupt()


def _interrupt() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
