"""A device goes from task to task: the lowest of those that may begin is next, and what may not yet holds up nobody."""

from __future__ import annotations

import threading
from typing import Any

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
