"""Which cores of the machine a benchmark uses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")


@contextmanager
def one_core() -> Iterator[None]:
    """Within the block, all threads of this process share one core, where the system lets them be moved."""
    if not _TASKS.is_dir() or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        _move_all_threads({max(cores)})
        yield
    finally:
        _move_all_threads(cores)


def _move_all_threads(cores: Iterable[int]) -> None:
    for task in _TASKS.iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(task.name), cores)
