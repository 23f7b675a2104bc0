"""A device goes from task to task: the lowest of those that may begin is next, and what may not yet holds up nobody."""

from __future__ import annotations

import threading
import time
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.runtime.engine.turns import Turns


def test_a_task_that_may_not_begin_lets_others_pass() -> None:
    turns, begun, open_for = Turns(), [], set()

    def queue(name: str, place: int) -> None:
        turns.queue(place, 0, 0, lambda: begun.append(name), lambda: name in open_for)

    open_for |= {"now"}
    queue("now", 5)
    queue("early", 1)
    queue("late", 2)
    assert begun == ["now"]
    open_for |= {"late"}
    turns.pass_on()
    assert begun == ["now", "late"]
    turns.pass_on()  # nobody: the device is free
    assert begun == ["now", "late"]
    open_for |= {"early"}
    turns.look_again()
    assert begun == ["now", "late", "early"]


def test_looking_again_disturbs_no_task_at_work() -> None:
    turns, begun = Turns(), []
    turns.queue(0, 0, 0, lambda: begun.append("first"))
    turns.queue(0, 0, 1, lambda: begun.append("second"))
    turns.look_again()
    assert begun == ["first"]


def test_a_thread_waits_until_it_may_begin() -> None:
    turns, begun, may_begin = Turns(), threading.Event(), threading.Event()

    def work() -> None:
        turns.take(0, 0, 1, may_begin.is_set)
        begun.set()
        turns.pass_on()

    thread = threading.Thread(target=work)
    thread.start()
    assert not begun.wait(0.05)
    may_begin.set()
    while not begun.is_set():  # the thread may not have come to wait yet, and then looks for itself
        turns.look_again()
    thread.join()


def test_a_task_that_is_expected_goes_before_one_that_is_there() -> None:
    turns, begun = Turns(), []
    turns.expect(1, 0, 0, inf)
    turns.queue(2, 0, 1, lambda: begun.append("later"))
    turns.queue(0, 0, 2, lambda: begun.append("sooner"))  # it would not wait for the one that is expected
    assert begun == ["sooner"]
    turns.pass_on()
    turns.look_again()
    assert begun == ["sooner"]
    turns.queue(1, 0, 0, lambda: begun.append("expected"))
    assert begun == ["sooner", "expected"]
    turns.pass_on()
    assert begun == ["sooner", "expected", "later"]


def test_a_task_that_does_not_come_is_waited_for_no_longer_than_was_said() -> None:
    turns, begun = Turns(), []
    turns.expect(1, 0, 0, time.perf_counter() + 0.05)
    turns.queue(2, 0, 1, lambda: begun.append("later"))
    turns.look_again()
    assert begun == []
    time.sleep(0.06)
    turns.look_again()
    assert begun == ["later"]


def test_a_task_that_goes_elsewhere_is_not_waited_for() -> None:
    turns, begun = Turns(), []
    turns.expect(1, 0, 0, inf)
    turns.queue(2, 0, 1, lambda: begun.append("later"))
    turns.expect_no_more(0, 0)
    assert begun == ["later"]


@pytest.mark.parametrize("place", [0, 2])
def test_a_thread_takes_its_turn_at_once_unless_another_task_is_expected_before(place: int) -> None:
    turns = Turns()
    turns.expect(1, 0, 0, inf)
    assert turns.take_now(place, 0, 1) == (place < 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_tasks_that_were_expected_run_in_their_order(tasks: list[tuple[int, int, bool]]) -> None:
    turns, begun = Turns(), []
    keys = [(place, call, 0) for call, (place, _, _) in enumerate(tasks)]
    for key in keys:
        turns.expect(*key, inf)
    for _, call in sorted((moment, call) for call, (_, moment, _) in enumerate(tasks)):
        if tasks[call][2]:
            turns.queue(*keys[call], lambda call=call: begun.append(call))
        else:
            turns.expect_no_more(call, 0)
    for _ in tasks:
        turns.pass_on()
    assert begun == [call for key, call in sorted((keys[call], call) for call in range(len(tasks))) if tasks[call][2]]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=12), st.data())
def test_everything_runs_once_whenever_it_may_begin(tasks: list[tuple[int, int]], data: Any) -> None:
    turns, begun, open_for = Turns(), [], set()
    for number, (place, lane) in enumerate(tasks):
        turns.queue(
            place, 0, lane, lambda number=number: begun.append(number), lambda number=number: number in open_for
        )
    closed = list(data.draw(st.permutations(range(len(tasks)))))
    while len(begun) < len(tasks):
        before = len(begun)
        if closed:
            open_for.add(closed.pop())
        turns.look_again()
        if len(begun) > before or begun:
            turns.pass_on()
        if not closed:
            turns.look_again()
    assert sorted(begun) == list(range(len(tasks)))
