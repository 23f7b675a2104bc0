"""Whether this thread works for a device: code of units then runs where it is, and calls of units do not leave it."""

from __future__ import annotations

import threading


class _Local(threading.local):
    is_at_work = False


_LOCAL = _Local()


def is_at_work() -> bool:
    """Whether this thread runs a task of a device, or is there for nothing else."""
    return _LOCAL.is_at_work


class AtWork:
    """Context in which this thread works for a device, and has its name: that is what profilers and debuggers show.

    A class, because every task enters it: `contextlib.contextmanager` takes several times as long.

    Args:
        name: Name of the thread meanwhile.
    """

    __slots__ = ("_before", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        thread = threading.current_thread()
        self._before = (_LOCAL.is_at_work, thread.name)
        _LOCAL.is_at_work = True
        thread.name = self._name

    def __exit__(self, *failure: object) -> None:
        _LOCAL.is_at_work, threading.current_thread().name = self._before
