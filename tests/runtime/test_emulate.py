"""The CPU plays devices of unequal speed. Sleeps are counted, not timed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.runtime.emulate import METER, Pace, paces

THREE = "cpu@speed=2,mem=1GiB,cpu@speed=1,mem=1GiB,threads=1,cpu@speed=0.5,mem=1GiB"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of every sleep, which do not take place. Nobody else uses the processor, and no sleep was too long."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr(time, "perf_counter", time.thread_time)
    monkeypatch.setattr(METER, "_late_s", 0.0)
    return found


def test_the_fastest_runs_at_the_pace_of_the_cpu() -> None:
    assert paces(resolve_devices(THREE)) == {
        "emulated:0": Pace(0.0),
        "emulated:1": Pace(1.0, 1),
        "emulated:2": Pace(3.0),
    }
    assert paces(resolve_devices("cpu")) == {}


def test_slow_devices_are_followed_by_a_sleep_in_forward_and_in_backward(place: Any, slept: list[float]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    place(model, {"0": "emulated:0", "1": "emulated:1", "2": "emulated:2"}, THREE)
    y = model(torch.ones(8, 64))
    assert len(slept) == 2
    y.sum().backward()
    assert len(slept) == 4
    assert min(slept) > 0


def test_a_fast_device_is_not_slowed(place: Any, slept: list[float]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    place(model, {"": "emulated:0"}, THREE)
    model(torch.ones(1, 8)).sum().backward()
    assert slept == []


def test_the_sleep_is_in_proportion_to_the_work(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 2.0, 2.0])
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    METER.enter(Pace(3.0))
    METER.leave()
    assert slept == [6.0]


def test_a_device_has_its_number_of_threads_and_the_host_gets_its_own_back(place: Any, slept: list[float]) -> None:
    seen: list[int] = []

    class Counts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = nn.Sequential(Counts(2, 2), Counts(2, 2))
        place(model, {"0": "emulated:1", "1": "emulated:0"}, THREE)
        model(torch.ones(1, 2)).sum().backward()
        assert seen == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_outputs_may_still_be_changed_in_place(place: Any, slept: list[float]) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    place(model, {"": "emulated:2"}, THREE)
    y = model(torch.ones(1, 2))
    y += 1
    y.sum().backward()
