"""Ranks as threads of one process: the same exchange, without processes to start."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # programs that processes run are modules of tests, too


class ThreadExchange:
    """An `Exchange` between threads."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(values)
        self._values = values
        self._barrier = barrier

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self.gather(value)[source]

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(size, work)`: what `work(exchange)` returns on each rank, or the error that it raises there."""

    def run(size: int, work: Callable[[ThreadExchange], Any]) -> list[Any]:
        values, barrier = [None] * size, threading.Barrier(size, timeout=20)
        results: list[Any] = [None] * size

        def rank(number: int) -> None:
            try:
                results[number] = work(ThreadExchange(number, values, barrier))
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run
