"""Lanes of short tasks run one after the other, those of long ones side by side; the numbers are the same.

Lanes run tasks themselves, but long ones that have to wait for a busy device are run by its own thread.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.record import Recorder
from lightning_hetero.runtime.engine.worker import Task, Worker
from lightning_hetero.testing.cut_models import Between

MakePair = Callable[..., Any]
WHERE = {"a": "emulated:0", "b": "emulated:1", "c": "emulated:2"}
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
ALL = 4  # lanes at once with three devices


class Rest(nn.Linear):
    """A layer that takes its time."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        return super().forward(x)


class Company:
    """Code of lanes that counts how many of them are in it at once, where no trial looks for what changes."""

    def __init__(self) -> None:
        self._counts = bytearray(2)  # now, and at most
        self._lock = threading.Lock()

    @property
    def most(self) -> int:
        return self._counts[1]

    def forget(self) -> None:
        self._counts[1] = 0

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        with self._lock:
            self._counts[0] += 1
            self._counts[1] = max(self._counts)
        time.sleep(0.005)
        with self._lock:
            self._counts[0] -= 1
        return model.c(torch.tanh(x))  # type: ignore[operator, no-any-return]


@pytest.fixture
def devices() -> str:
    """Those whose tasks lanes run themselves."""
    return EMULATED


def let_tasks_take(both: Any, seconds: float) -> None:
    for worker in both.engine.threads.workers.values():
        worker.task_s = seconds


def test_long_tasks_are_known_by_their_time(pair: MakePair) -> None:
    both = pair(nn.Sequential(Rest(8, 8), Rest(8, 8), Rest(8, 8)), dict(zip("012", WHERE.values(), strict=True)))
    for _ in range(4):
        both.step(lambda model: model(torch.randn(8, 8)).pow(2).mean())
    assert all(worker.task_s > 0.001 for worker in both.engine.threads.workers.values())
    assert both.engine.threads.lanes_at_once == ALL


def by_whom(worker: Worker, *, task_s: float, busy: bool) -> str:
    """Which thread runs a task of a lane, on a device that has something else to do or not."""
    worker.task_s = task_s
    begun, go_on = threading.Event(), threading.Event()

    def other() -> None:
        begun.set()
        assert go_on.wait(10)

    others = worker.submit(0, 0, Task("F", "other", 0, 0, other)) if busy else None
    assert not busy or begun.wait(10)
    found: list[int] = []
    task = Task("F", "unit", 0, 1, lambda: found.append(threading.get_ident()))
    lane = threading.Thread(target=worker.help, args=(0, 0, task))
    lane.start()
    time.sleep(0.02)
    assert not (busy and found)
    go_on.set()
    lane.join(10)
    if others is not None:
        others.get(10)
    return {lane.ident: "lane", worker.ident: "device"}[found[0]]


@pytest.mark.parametrize(
    ("task_s", "busy", "by"),
    [(1e-5, False, "lane"), (1e-5, True, "lane"), (0.1, False, "lane"), (0.1, True, "device")],
    ids=["short, free", "short, busy", "long, free", "long, busy"],
)
def test_long_tasks_that_have_to_wait_are_run_by_the_thread_of_their_device(task_s: float, busy: bool, by: str) -> None:
    worker = Worker("cpu", torch.device("cpu"), 1, Recorder())
    worker.start()
    try:
        assert worker.takes_help
        assert by_whom(worker, task_s=task_s, busy=busy) == by
    finally:
        worker.stop()
        worker.join(10)


class Seen(nn.Linear):
    """A layer that knows what state the thread is in that runs it, where no trial looks for what changes."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.seen = array("d", [0.0] * 3)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        here = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        for index, state in enumerate(here):
            self.seen[index] += state
        return super().forward(x)


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference_mode", "autocast"])
def test_whoever_runs_a_long_task_is_in_the_state_of_the_user(pair: MakePair, mode: str) -> None:
    both = pair(nn.Sequential(Seen(), Seen(), Seen()), dict(zip("012", WHERE.values(), strict=True)), micro_batches=4)
    contexts: dict[str, Callable[[], Any]] = {
        "plain": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    batch = torch.randn(8, 8)
    with contexts[mode]():
        # Not of the whole batch: how a matrix product rounds depends on the number of rows, on some processors.
        expected = torch.cat([both.alone(part) for part in batch.chunk(4)])
        both.model(batch)  # tries whether it may be cut
        let_tasks_take(both, 0.1)
        for part in both.model:
            part.seen[:] = array("d", [0.0] * 3)
        output = both.model(batch)
    assert both.calls
    assert torch.equal(output, expected)
    state = [4.0 * (mode in ("plain", "autocast")), 4.0 * (mode == "inference_mode"), 4.0 * (mode == "autocast")]
    assert [list(part.seen) for part in both.model] == [state] * 3


@pytest.mark.parametrize(("seconds", "lanes"), [(1e-5, 1), (0.1, ALL)])
def test_so_many_lanes_are_under_way(pair: MakePair, seconds: float, lanes: int) -> None:
    company = Company()
    both = pair(Between(lambda model, x: company(model, x), c=nn.Linear(8, 8)), WHERE, micro_batches=8)
    both.step(lambda model: model(torch.randn(16, 8)).pow(2).mean())  # tries whether it may be cut
    let_tasks_take(both, seconds)
    assert both.engine.threads.lanes_at_once == lanes
    company.forget()
    both.model(torch.randn(16, 8))
    assert company.most <= lanes
    assert (company.most == 1) == (lanes == 1)


def test_numbers_do_not_depend_on_it(pair: MakePair) -> None:
    def results(seconds: float) -> list[Tensor]:
        torch.manual_seed(0)
        layers = (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()) for _ in range(3))
        both = pair(nn.Sequential(*layers), dict(zip("012", WHERE.values(), strict=True)))
        batch, found = torch.randn(16, 8), []
        for _ in range(5):
            let_tasks_take(both, seconds)
            both.model.zero_grad()
            output = both.model(batch)
            output.pow(2).mean().backward()
            found += [output.detach(), *(parameter.grad.clone() for parameter in both.model.parameters())]
        assert not both.engine.reasons
        return found

    short, long = results(1e-5), results(0.1)
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
