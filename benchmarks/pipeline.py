"""How close micro-batches come to what their schedule allows, on stages that sleep instead of working.

A sleeping stage leaves the processor to the engine, as an accelerator would, so that only schedule and engine count. A
stage sleeps in proportion to the rows, and twice as long in the backward. The ideal is that of the simulator for the
same stages: all forwards before the first backward for "forward", one forward and one backward in turn for "step".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.schedule import GPipe, OneFOneB
from lightning_hetero.simulate import StageCost, simulate

CASES = {"40_40": (40, 40), "60_20": (60, 20), "20_60": (20, 60), "30_30_30": (30, 30, 30)}  # forward, in ms
MICRO_BATCHES = (4, 8)
ROWS = 32
REPETITIONS, QUICK_REPETITIONS = 9, 3


class Nap(torch.autograd.Function):
    """Passes a tensor on after some time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, second_per_row: float) -> Tensor:  # noqa: D102
        ctx.second_per_row = second_per_row
        time.sleep(second_per_row * x.shape[0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        time.sleep(2 * ctx.second_per_row * gradient.shape[0])
        return gradient, None


class Stage(nn.Module):
    """A weight, so that it is placed, and a nap."""

    def __init__(self, batch_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.second_per_row = batch_s / ROWS

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return Nap.apply(x * self.weight, self.second_per_row)  # type: ignore[no-any-return, no-untyped-call]


class Model(nn.Module):
    """Stages in a row, and a training step."""

    def __init__(self, stages_s: list[float]) -> None:
        super().__init__()
        self.net = nn.Sequential(*map(Stage, stages_s))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: D102
        return self.net(batch).mean()  # type: ignore[no-any-return]


def seconds(stages_s: list[float], micro_batches: int, mode: str, repetitions: int) -> float:
    """Median time of a forward and backward."""
    model = Model(stages_s)
    names = [f"emulated:{index}" for index in range(len(stages_s))]
    where = {f"net.{index}": name for index, name in enumerate(names)}
    inventory = resolve_devices(",".join(["cpu@speed=1"] * len(names)))
    plan = make_plan(ManualPolicy(where), Problem(graph=find_units(model), inventory=inventory))
    placed = PlacedModel(model, plan, Pipelining(micro_batches=micro_batches))
    placed.place()
    assert placed.engine is not None
    stepper = Stepper(placed.engine, model, "training_step", OneFOneB(), (), ())
    batch = torch.randn(ROWS, 4)

    def step() -> Tensor:
        if mode == "forward":
            return model.training_step(batch, 0)
        result = stepper.run((batch, 0), 1.0)
        assert result is not None
        assert result.loss is not None
        return result.loss

    try:
        step().backward()  # finds out what may be cut
        return statistics.median(timed(lambda: step().backward()) for _ in range(repetitions))
    finally:
        stepper.close()
        placed.release(torch.device("cpu"))


def timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def ideal_s(stages_s: list[float], micro_batches: int, mode: str) -> float:
    """What the simulator says if nothing but the stages takes time."""
    costs = [
        StageCost(device=str(index), forward_s=batch_s / micro_batches, backward_s=2 * batch_s / micro_batches)
        for index, batch_s in enumerate(stages_s)
    ]
    return simulate(costs, GPipe() if mode == "forward" else OneFOneB(), micro_batches).makespan_s


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    figures = {}
    for name, stages_ms in CASES.items():
        stages_s = [stage_ms / 1000 for stage_ms in stages_ms]
        for micro_batches in MICRO_BATCHES:
            for mode in ("forward", "step"):
                measured_s = seconds(stages_s, micro_batches, mode, QUICK_REPETITIONS if quick else REPETITIONS)
                figures[f"{mode}_{name}_{micro_batches}"] = ideal_s(stages_s, micro_batches, mode) / measured_s
    report(figures)


if __name__ == "__main__":
    main()
