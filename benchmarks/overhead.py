"""CPU time that the engine adds to a forward and backward in micro-batches, against a plain loop over the same ones.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --quick

Both run in one process and take turns. CPU time of all threads is counted, so waiting does not count, neither for other
programs nor for each other. But two threads that compute at once are slower where their cores share caches, the way to
memory, or a clock, and the plain loop is never two. So everything is measured a second time with all threads on one
core, where only what the engine does is left (Linux; elsewhere the two are the same). And the two halves of each model
run in plain loops of their own, at once in two threads: what the processor takes more for that is not the engine's.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from cores import one_core
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.placed import Pipelining, PlacedModel

MICRO_BATCHES = 4
TINY_UNITS = 8
TINY_LAPS, QUICK_TINY_LAPS = 100, 3
LAPS, QUICK_LAPS = 25, 1
WARM_UP, QUICK_WARM_UP = 3, 1
QUICK_SHARE = 4  # a quick run has so much less rows

Step = Callable[[], object]


class Convolution(nn.Module):
    """A convolution and what follows it. Shape (rows, channels, height, width)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.relu(self.convolution(x))


def linear(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def tiny() -> tuple[list[nn.Module], Tensor]:
    return [linear(16) for _ in range(TINY_UNITS)], torch.randn(16, 16)


def mlp() -> tuple[list[nn.Module], Tensor]:
    return [linear(1024) for _ in range(8)], torch.randn(256, 1024)


def transformer() -> tuple[list[nn.Module], Tensor]:
    layers = [nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(4)]
    return [*layers], torch.randn(16, 64, 256)


def convnet() -> tuple[list[nn.Module], Tensor]:
    return [Convolution(3 if index == 0 else 48, 48) for index in range(6)], torch.randn(32, 3, 32, 32)


class Subject:
    """A model in micro-batches over two devices that the CPU plays, and its copy in a plain loop.

    Args:
        layers: The model.
        batch: Its input.
        device_of: Index of the device of each layer.
    """

    def __init__(self, layers: list[nn.Module], batch: Tensor, device_of: list[int]) -> None:
        self.batch = batch
        self.plain = nn.Sequential(*layers)
        self.cut = copy.deepcopy(self.plain)
        root = nn.ModuleDict({"net": self.cut})
        where = {f"net.{layer}": f"emulated:{device}" for layer, device in enumerate(device_of)}
        inventory = resolve_devices(",".join(["cpu@speed=1"] * 2))
        plan = make_plan(ManualPolicy(where), Problem(graph=find_units(root), inventory=inventory))
        self.placed = PlacedModel(root, plan, Pipelining(micro_batches=MICRO_BATCHES))
        self.placed.place()
        middle = device_of.index(1)
        first, second = copy.deepcopy(self.plain[:middle]), copy.deepcopy(self.plain[middle:])
        self.first_half = first, batch
        self.second_half = second, first(batch).detach().requires_grad_()
        self.pool = ThreadPoolExecutor(1)

    def run_cut(self) -> None:
        """Forward and backward in micro-batches over the devices."""
        self.cut.zero_grad()
        self.cut(self.batch).pow(2).mean().backward()

    def release(self) -> None:
        """End the threads."""
        self.pool.shutdown()
        self.placed.release(torch.device("cpu"))

    def run_plain(self) -> None:
        """Forward and backward of one micro-batch after the other."""
        loop(self.plain, self.batch)

    def run_halves(self) -> None:
        """The same for the halves of the model, at the same time: the second does not wait for the first."""
        second = self.pool.submit(loop, *self.second_half)
        loop(*self.first_half)
        second.result()


def loop(model: nn.Module, batch: Tensor) -> None:
    """Forward and backward of one micro-batch after the other."""
    model.zero_grad()
    for part in batch.chunk(MICRO_BATCHES):
        (model(part).pow(2).mean() / MICRO_BATCHES).backward()


def cpu_s(step: Step, steps: int) -> float:
    """CPU seconds of one step, of all threads."""
    start_s = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start_s) / steps


class Seconds(NamedTuple):
    """CPU seconds of a step, for each lap.

    Attributes:
        cut: In micro-batches.
        plain: In the plain loop.
        again: In the plain loop once more.
        halves: Of the halves of the model in two plain loops at once.
    """

    cut: list[float]
    plain: list[float]
    again: list[float]
    halves: list[float]


def compare(subject: Subject, laps: int, steps_per_turn: int, warm_up: int = WARM_UP) -> Seconds:
    """CPU seconds of a step in all these ways."""
    steps = (subject.run_cut, subject.run_plain, subject.run_plain, subject.run_halves)
    for step in steps * warm_up:
        step()
    assert subject.placed.engine is not None
    assert not subject.placed.engine.reasons
    seconds = [[cpu_s(step, steps_per_turn) for step in steps] for _ in range(laps)]
    return Seconds(*map(list, zip(*seconds, strict=True)))


def difference(seconds: list[float], less: list[float]) -> float:
    return statistics.median(a - b for a, b in zip(seconds, less, strict=True))


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    laps = QUICK_TINY_LAPS if quick else TINY_LAPS
    layers, batch = tiny()
    # Neighbours are on different devices, so that every layer is a call of its own.
    subject = Subject(layers, batch, [layer % 2 for layer in range(len(layers))])
    seconds = compare(subject, laps, 5)
    with one_core():
        alone = compare(subject, laps, 5)
    subject.release()
    us = 1e6 / (len(layers) * MICRO_BATCHES)
    figures = {
        "us_per_call": difference(seconds.cut, seconds.plain) * us,
        "noise_us_per_call": difference(seconds.again, seconds.plain) * us,
        "plain_us_per_call": statistics.median(seconds.plain) * us,
        "one_core_us_per_call": difference(alone.cut, alone.plain) * us,
        "one_core_plain_us_per_call": statistics.median(alone.plain) * us,
    }
    laps, warm_up = (QUICK_LAPS, QUICK_WARM_UP) if quick else (LAPS, WARM_UP)
    for model in (mlp, transformer, convnet):
        layers, batch = model()
        if quick:
            batch = batch[: len(batch) // QUICK_SHARE]
        subject = Subject(layers, batch, [2 * layer // len(layers) for layer in range(len(layers))])
        seconds = compare(subject, laps, 1, warm_up)
        with one_core():
            alone = compare(subject, laps, 1, warm_up)
        subject.release()
        figures[f"{model.__name__}_ratio"] = ratio(seconds.cut, seconds.plain)
        figures[f"{model.__name__}_noise_ratio"] = ratio(seconds.again, seconds.plain)
        figures[f"{model.__name__}_halves_ratio"] = ratio(seconds.halves, seconds.plain)
        figures[f"{model.__name__}_one_core_ratio"] = ratio(alone.cut, alone.plain)
    report(figures)


if __name__ == "__main__":
    main()
