"""A device that the CPU plays takes what its work usually takes, so many times; sleeps and clocks are counted."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from torch import nn

from lightning_hetero.runtime.emulate import Meter, Pace, Usual, kind_of


class Clock:
    """A thread that computes as long as it is told."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self.late_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.wall_s += seconds + self.late_s

    wall_s = 0.0

    def work(self, seconds: float, waiting_s: float = 0.0) -> None:
        self.now_s += seconds
        self.wall_s += seconds + waiting_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "thread_time", lambda: found.now_s)
    monkeypatch.setattr(time, "perf_counter", lambda: found.wall_s)
    monkeypatch.setattr(time, "sleep", found.sleep)
    return found


def call(meter: Meter, clock: Clock, seconds: float, pace: Pace, waiting_s: float = 0.0) -> None:
    meter.enter(pace, "kind")
    clock.work(seconds, waiting_s)
    meter.leave()


def test_a_call_that_is_slow_by_chance_ends_when_it_usually_does(clock: Clock) -> None:
    meter, pace = Meter(), Pace(3.0)
    for _ in range(8):
        call(meter, clock, 1.0, pace)
    assert clock.slept == [3.0] * 8
    call(meter, clock, 2.5, pace)
    call(meter, clock, 1.0, pace, waiting_s=0.5)  # for a core
    assert clock.slept[8:] == [1.5, 2.5]


def test_what_a_sleep_got_too_long_is_taken_off_the_next_one(clock: Clock) -> None:
    meter, pace = Meter(), Pace(1.0)
    clock.late_s = 0.001
    for _ in range(3):
        call(meter, clock, 1.0, pace)
    assert clock.slept == pytest.approx([1.0, 0.999, 0.999])


def test_a_worker_sleeps_once_for_all_units_of_a_task(clock: Clock) -> None:
    meter, pace = Meter(), Pace(1.0)
    meter.defer()
    for _ in range(3):
        call(meter, clock, 1.0, pace)
    assert clock.slept == []
    meter.pay()
    assert clock.slept == [3.0]


def test_the_fastest_device_is_the_cpu_itself(clock: Clock) -> None:
    meter, pace = Meter(), Pace(0.0)
    for seconds in (1.0, 5.0, 1.0):
        call(meter, clock, seconds, pace)
    assert clock.slept == []


def test_usual_is_the_lower_quartile_once_there_is_enough_to_tell() -> None:
    usual = Usual()
    assert [usual("a", seconds) for seconds in (4.0, 3.0, 2.0)] == [4.0, 3.0, 2.0]
    assert usual("a", 1.0) == 2.0
    assert usual("b", 9.0) == 9.0


def test_a_copy_learns_anew() -> None:
    pace = Pace(1.0)
    for _ in range(8):
        pace.usual("a", 1.0)
    for twin in (copy.deepcopy(pace), pickle.loads(pickle.dumps(pace))):
        assert twin == pace
        assert twin.usual("a", 7.0) == 7.0


def test_kinds_differ_by_rows_and_modes_and_not_by_values() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    assert kind_of(one, (torch.ones(2, 4),)) == kind_of(other, (torch.zeros(2, 4),))
    assert kind_of(one, (torch.ones(3, 4),)) != kind_of(one, (torch.ones(2, 4),))
    assert kind_of(nn.Linear(4, 5), (torch.ones(2, 4),)) != kind_of(one, (torch.ones(2, 4),))
    with torch.no_grad():
        without = kind_of(one, (torch.ones(2, 4),))
    assert without != kind_of(one, (torch.ones(2, 4),))
