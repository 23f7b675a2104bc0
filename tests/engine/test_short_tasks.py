"""Lanes of short tasks run one after the other, those of long ones side by side; the numbers are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
