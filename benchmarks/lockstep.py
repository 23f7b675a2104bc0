"""Compares Trainers on a machine that is not quiet: they run side by side and take turns every few steps.

A shared machine changes its pace within seconds, by more than the differences looked for. Whole runs that follow one
another meet different conditions; turns of a few milliseconds meet the same. Each Trainer has a thread, of which only
one runs at a time, so the CPU time of the process between two turns is that of one Trainer, autograd threads included.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightning.pytorch as pl

TURN_STEPS = 5
WARM_UP_TURNS = 6


class Turns:
    """Lets one thread run at a time. The order is drawn anew for every lap, so that nobody has a better place in it.

    Args:
        names: One for each thread, in the order of the first lap.
        seed: Of the order of the other laps.
    """

    def __init__(self, names: list[str], seed: int) -> None:
        self._gates = {name: threading.Semaphore(0) for name in names}
        self._lap = names[::-1]
        self._random = random.Random(seed)

    def start(self) -> None:
        """Give the first turn."""
        self._gates[self._next()].release()

    def wait(self, name: str) -> None:
        """Wait for the turn of `name`."""
        self._gates[name].acquire()

    def pass_on(self, name: str) -> None:
        """End the turn of `name`, and wait for its next one."""
        self._gates[self._next()].release()
        self.wait(name)

    def leave(self, name: str) -> None:
        """End the turn of `name`, which takes no others."""
        del self._gates[name]
        self._lap = [other for other in self._lap if other != name]
        if self._gates:
            self.start()

    def _next(self) -> str:
        if not self._lap:
            self._lap = self._random.sample(list(self._gates), len(self._gates))
        return self._lap.pop()


class Stopwatch(pl.Callback):
    """Measures a Trainer's turns and ends them.

    Attributes:
        step_s: CPU seconds per step, one number for each turn.
    """

    def __init__(self, name: str, turns: Turns) -> None:
        self.step_s: list[float] = []
        self._name = name
        self._turns = turns
        self._since_s: float | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Between one call and the next lies one whole step, the loading of its batch included."""
        if batch_idx % TURN_STEPS:
            return
        now_s = time.process_time()
        if self._since_s is not None:
            self.step_s.append((now_s - self._since_s) / TURN_STEPS)
        self._turns.pass_on(self._name)
        self._since_s = time.process_time()


def steps_needed(measured_steps: int) -> int:
    """How many steps a Trainer has to make so that `measured_steps` are measured after the warm-up."""
    return measured_steps + WARM_UP_TURNS * TURN_STEPS + 1


def side_by_side(fits: Mapping[str, Callable[[pl.Callback], object]], seed: int) -> dict[str, list[float]]:
    """Run all fits at once, taking turns.

    Args:
        fits: Each takes a callback and calls `Trainer.fit` with it. They are set up in this order.
        seed: Of the order of turns.

    Returns:
        CPU seconds per step of every turn after the warm-up, by name; turns of one lap have the same index.
    """
    turns = Turns(list(fits), seed)
    watches = {name: Stopwatch(name, turns) for name in fits}

    def run(name: str) -> None:
        turns.wait(name)
        try:
            fits[name](watches[name])
        finally:
            turns.leave(name)

    gc.collect()
    with ThreadPoolExecutor(len(fits)) as pool:
        running = [pool.submit(run, name) for name in fits]
        turns.start()
    for fit in running:
        fit.result()
    return {name: watch.step_s[WARM_UP_TURNS:] for name, watch in watches.items()}
