"""Failures: errors that say where they happened, and waiting that does not last for ever."""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import threading

from lightning_hetero.errors import HangError

_DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd_bundle")


class Countdown:
    """Waits until something has happened a number of times.

    Args:
        count: How often.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._none_waits = threading.Lock()  # released for good in the end; an Event takes five times as long to make
        self._none_waits.acquire()

    def count_down(self) -> None:
        """It has happened once more."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._none_waits.release()

    def wait(self, timeout_s: float) -> bool:
        """Wait; returns whether it happened often enough in time."""
        # The count comes first: whoever is interrupted between the next two lines has taken the lock for good.
        if self._count > 0 and self._none_waits.acquire(timeout=timeout_s):
            self._none_waits.release()
        return self._count <= 0


def annotated(error: BaseException, note: str) -> BaseException:
    """The error with a line on where it happened, shown under its traceback from Python 3.11 on."""
    notes = getattr(error, "__notes__", [])
    if note not in notes:
        try:
            error.__notes__ = [*notes, note]  # type: ignore[attr-defined]
        except AttributeError:  # an exception with slots
            return error
    return error


def hang(waiting_for: str, timeout_s: float, busy: str) -> HangError:
    """The error for a wait that took too long, with the stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        stacks = file.read()
    print(stacks, file=sys.stderr)
    return HangError(
        f"{waiting_for} has not ended after {timeout_s:g} s. {busy} What every thread was doing stands on stderr. "
        "If the step is only slow, raise hang_timeout_s."
    )


def is_debugged(thread: threading.Thread) -> bool:
    """Whether somebody looks at a thread in a debugger, and takes the time that it takes."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
