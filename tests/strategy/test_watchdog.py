"""What hangs in the first steps of a run is ended; what is only slow, or is looked at in a debugger, is not."""

from __future__ import annotations

import os
import pdb
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_hetero.errors import HangError
from lightning_hetero.strategy.watchdog import Watchdog


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    found = Watchdog(0.2)
    yield found
    found.close()


def test_waiting_for_ever_is_ended_with_all_stacks(watchdog: Watchdog, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    message = r"^the test has not ended after 0\.3 s\. It ran in the main thread"
    with pytest.raises(HangError, match=message), watchdog.over("the test"):
        threading.Event().wait()
    assert signal.getsignal(signal.SIGINT) is before
    printed = capfd.readouterr().err
    assert "test_waiting_for_ever_is_ended_with_all_stacks" in printed


def test_only_the_block_is_watched_and_for_as_long_as_it_may_take(watchdog: Watchdog) -> None:
    before = signal.getsignal(signal.SIGINT)
    with watchdog.over("a step"), watchdog.over("a part of it"):
        pass
    time.sleep(0.5)
    with watchdog.over("measuring", 60.0):
        time.sleep(0.5)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stays_what_it_is(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(*_: object) -> None:
        raise KeyboardInterrupt("mine")

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="mine"), watchdog.over("a step"):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_set_within_the_block_stays(watchdog: Watchdog) -> None:
    def handler(*_: object) -> None:
        raise KeyboardInterrupt("mine")

    before = signal.getsignal(signal.SIGINT)
    try:
        with watchdog.over("a step"):
            signal.signal(signal.SIGINT, handler)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="a process ends by a signal on POSIX only")
def test_ctrl_c_ends_a_program_that_left_it_to_the_system(run_python: Callable[..., Any]) -> None:
    program = """
import signal
from lightning_hetero.strategy.watchdog import Watchdog
signal.signal(signal.SIGINT, signal.SIG_DFL)
with Watchdog(60.0).over("a step"):
    signal.raise_signal(signal.SIGINT)
print("still here")
"""
    done = run_python("-c", program)
    assert done.returncode == -signal.SIGINT
    assert "still here" not in done.stdout


def test_a_debugger_has_all_the_time_in_the_world(watchdog: Watchdog) -> None:
    class Patient(pdb.Pdb):
        def interaction(self, *_: object) -> None:
            looked.append(time.sleep(0.8))

    looked: list[None] = []
    namespace = {"__name__": "pdb", "look": lambda: Patient().interaction()}
    with watchdog.over("a step"):
        exec("look()", namespace)  # a frame of a debugger is below
    assert looked == [None]


def test_other_threads_are_not_watched(watchdog: Watchdog) -> None:
    ended = []

    def work() -> None:
        with watchdog.over("a thread"):
            time.sleep(0.6)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
