"""Makes the CPU play devices of unequal speed: what runs on a slow one is followed by a sleep in proportion.

Speeds are relative, so the fastest emulated device runs at the CPU's own pace. Forward and backward are both
stretched. The backward of a block is taken to begin when the gradient of one of its outputs is known, and to last
until that of another block begins or the whole backward ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import map_tensors


@dataclass(frozen=True, slots=True)
class Pace:
    """How an emulated device works.

    Attributes:
        stretch: Seconds of sleep for each second of work.
        threads: Intra-op threads; None leaves torch's setting alone.
    """

    stretch: float = 0.0
    threads: int | None = None


HOST = Pace()


def paces(devices: Iterable[DeviceSpec]) -> dict[str, Pace]:
    """The pace of each emulated device, by name, relative to the fastest of them."""
    emulated = [device for device in devices if device.emulated]
    fastest = max((device.speed for device in emulated), default=1.0)
    return {device.name: Pace(fastest / device.speed - 1.0, device.threads) for device in emulated}


class Meter(threading.local):
    """Measures how long a thread works at each pace, and sleeps what a slower device would need on top."""

    def __init__(self) -> None:
        self._pace = HOST
        self._since_s = 0.0
        self._outer: list[Pace] = []
        self._host_threads = 0
        self._debt_s: float | None = None

    def defer(self) -> None:
        """This thread sleeps when it is told to `pay`, not after every module: each sleep lasts a little too long."""
        self._debt_s = 0.0

    def pay(self) -> None:
        """Sleep what has come together since the last time."""
        debt_s, self._debt_s = self._debt_s, 0.0
        if debt_s:
            time.sleep(debt_s)
            self._since_s = time.thread_time()

    def enter(self, pace: Pace) -> None:
        """Work for a device begins, in the middle of other work."""
        self._outer.append(self._pace)
        self.switch(pace)

    def leave(self) -> None:
        """Work for a device ends; what it interrupted goes on."""
        self.switch(self._outer.pop() if self._outer else HOST)

    def begin_backward(self, pace: Pace) -> None:
        """The running backward reaches a block."""
        self.switch(pace)
        torch.autograd.Variable._execution_engine.queue_callback(self.rest)

    def rest(self) -> None:
        """No device works any more."""
        self._outer.clear()
        self.switch(HOST)

    def switch(self, pace: Pace) -> None:
        """Settle the work so far and go on at another pace.

        Thread time is measured, so neither the sleeps nor other programs on the machine count as work.
        """
        now_s = time.thread_time()
        owed_s = (now_s - self._since_s) * self._pace.stretch
        if pace.threads != self._pace.threads:
            if self._pace.threads is None:
                self._host_threads = torch.get_num_threads()
            torch.set_num_threads(pace.threads or self._host_threads)
        self._pace = pace
        if owed_s > 0 and self._debt_s is not None:
            self._debt_s += owed_s
        elif owed_s > 0:
            time.sleep(owed_s)
        self._since_s = time.thread_time()


METER = Meter()


@dataclass(frozen=True)
class EnterEmulated(Hook):
    """Forward pre-hook of a block on an emulated device."""

    pace: Pace

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Start the device's clock."""
        METER.enter(self.pace)


@dataclass(frozen=True)
class LeaveEmulated(Hook):
    """Forward hook of a block on an emulated device, called after an exception too (then `output` is None)."""

    pace: Pace

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Stop the clock, and see to it that the block's backward starts it again."""
        METER.leave()
        if torch.is_grad_enabled():
            map_tensors(output, self._watch, torch.device("cpu"))

    def _watch(self, tensor: Tensor) -> Tensor:
        # A hook, not a node of our own: user code may go on to change the output in place.
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(lambda _: METER.begin_backward(self.pace))
        return tensor
