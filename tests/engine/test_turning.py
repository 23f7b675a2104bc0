"""A device waits for the task that its schedule wants next if that is about to come, and for no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine import step
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.engine.turning import TurningPoint
from lightning_hetero.schedule import OneFOneB
from lightning_hetero.testing.naps import late

MakePair = Callable[..., Any]

EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
MICRO_BATCHES = 6
NAP_S = 4e-3


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return late(self.linear(x), NAP_S)


class Stages(nn.Module):
    def __init__(self, loss_s: float) -> None:
        super().__init__()
        self.a, self.b = Stage(), Stage()
        self.loss_s = loss_s

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs = self.b(self.a(batch))
        time.sleep(self.loss_s)
        return outputs.square().mean()


def ops_on_the_last_device(pair: MakePair, devices: str, model: nn.Module) -> list[list[str]]:
    """What the last stage did in each of some steps, such as F0 and B0; the first is left out, as it is a rehearsal."""
    names = [f"emulated:{index}" for index in range(3)] if devices == EMULATED else devices.split(",")
    both = pair(model, {"a": names[0], "b": names[1]}, micro_batches=MICRO_BATCHES)
    stepper = Stepper(both.engine, both.model, "training_step", OneFOneB(), (), ())
    batch = torch.randn(2 * MICRO_BATCHES, 8)
    found = []
    try:
        assert stepper.run((batch, 0), 1.0) is not None
        for _ in range(4):
            with both.placed.recording() as recording:
                assert stepper.run((batch, 0), 1.0) is not None
            timeline = recording.timeline
            found.append([f"{span.op}{span.micro_batch}" for span in timeline.work_of(timeline.devices[-1])])
    finally:
        stepper.close()
    return found


def test_the_last_stage_goes_back_before_the_next_forward(
    pair: MakePair, devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "PATIENCE", 1000)  # however slow the machine is, and whichever device was slowed down
    monkeypatch.setattr(step, "MUCH_BUSIER", 1000)
    *_, last = ops_on_the_last_device(pair, devices, Stages(loss_s=0.0))
    assert last == [f"{op}{index}" for index in range(MICRO_BATCHES) for op in "FB"]


def test_no_device_waits_while_user_code_takes_long(pair: MakePair, devices: str) -> None:
    *_, last = ops_on_the_last_device(pair, devices, Stages(loss_s=10 * NAP_S))
    assert last.index("F1") < last.index("B0")


_LOCK = threading.Lock()


class Locked(Stages):
    """User code that lets no two micro-batches be in its last part, or its loss, at once."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.a(batch)
        with _LOCK:
            outputs = self.b(hidden)
        with _LOCK:
            return outputs.square().mean()


def test_a_lock_of_user_code_does_not_stop_a_device_that_waits(pair: MakePair, devices: str) -> None:
    # One has the lock and wants the device, which is kept for another that wants the lock.
    *_, last = ops_on_the_last_device(pair, devices, model=Locked(loss_s=0.0))
    assert sorted(last) == sorted(f"{op}{index}" for index in range(MICRO_BATCHES) for op in "FB")


def test_times_of_the_loss_are_a_mean_of_the_last_ones() -> None:
    point = TurningPoint()
    point.note(4.0)
    assert point.loss_s == 4.0
    point.note(8.0)
    assert point.loss_s == 5.0
