"""In what order micro-batches of a step get to what keeps state, forwards first and then what runs again."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.gate import Gate, Together
from lightning_hetero.runtime.engine.handed_on import places_below, replaced
from lightning_hetero.runtime.engine.turnstile import Turnstile


def test_a_lane_that_has_ended_is_not_waited_for() -> None:
    turns = Turnstile(2, lambda: None)
    passed = threading.Event()

    def work() -> None:
        with turns.passing(1, "key", "Counts"):
            passed.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert not passed.wait(0.1)
    turns.end(0)
    assert passed.wait(5)
    thread.join()


def passages(calls: list[int], once: tuple[str, ...]) -> list[int]:
    """In what order lanes pass that begin in the opposite one, each as often as `calls` says."""
    turns = Turnstile(len(calls), lambda: None, once)
    order: list[int] = []

    def work(lane: int) -> None:
        for _ in range(calls[lane]):
            with turns.passing(lane, "key", "Counts"):
                order.append(lane)
        turns.end(lane)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(len(calls))]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    return order


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_lanes_pass_as_if_they_ran_one_after_the_other(calls: list[int]) -> None:
    expected = [lane for lane, count in enumerate(calls) for _ in range(count)]
    assert passages(calls, ()) == expected
    if max(calls) <= 1:
        assert passages(calls, ("key",)) == expected


def test_a_lane_that_has_passed_the_only_time_is_not_waited_for() -> None:
    turns = Turnstile(2, lambda: None, ("key",))
    for lane in (0, 1):
        with turns.passing(lane, "key", "Counts"):
            pass
    again = turns.passing(0, "key", "Counts")
    with (
        pytest.raises(CannotCutError, match="calls Counts more than once, whose calls have to keep their order"),
        again,
    ):
        pass
    with turns.passing(1, "key", "Counts"):  # nobody comes after it
        pass


class Counts(nn.Module):
    """A metric of a kind: `reset` is a method of its class. Calls itself, as torchmetrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self) -> int:
        self.reset()
        self.update()
        return self.compute()

    def update(self) -> None:
        self.count += 1

    def compute(self) -> int:
        return self.count

    def reset(self) -> None:
        self.count = 0


def test_a_gate_notes_what_others_call_and_not_what_a_metric_calls_of_itself() -> None:
    metric = Counts()
    gate = Gate(metric, Together(id(metric)))
    gate.install()
    assert metric() == 1
    assert gate.used == {"forward"}
    assert gate.needs_all_before is None
    metric.reset()
    assert "calls reset of Counts" in str(gate.needs_all_before)
    gate.remove()
    assert not {"update", "compute", "reset", "_compiled_call_impl"} & {
        key for key, value in vars(metric).items() if value is not None
    }


def test_copies_of_a_metric_have_methods_of_their_own() -> None:
    metric = Counts()
    gate = Gate(metric, Together(id(metric)))
    gate.install()
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        other.update()
        assert (other.compute(), metric.count) == (1, 0)
    assert not gate.used


class Takes(nn.Module):
    """Keeps a method that it is given."""

    def __init__(self, log: Any) -> None:
        super().__init__()
        self.log = log


class Logs(nn.Module):
    """Gives its method to a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Takes(self.log)

    def log(self) -> str:
        return "its own"


def test_methods_that_were_handed_on_are_replaced_and_put_back() -> None:
    model = Logs()
    method = model.part.log
    with replaced(places_below(model, ("log",)), lambda name: lambda: f"another {name}"):
        assert model.part.log() == "another log"
    assert model.part.log is method
