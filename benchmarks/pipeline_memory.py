"""How many micro-batches keep their activations at once, in each stage, on devices that count their memory.

    python benchmarks/pipeline_memory.py
    python benchmarks/pipeline_memory.py --quick

Four stages of equal layers lie on four devices of the emulated accelerator, whose allocator knows the peak. Weights are
small and activations large, so the peak above what a device holds between steps, divided by what one micro-batch leaves
there for its backward, is a number of micro-batches. What a layer needs while it runs is on top of that: about a tenth.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.schedule import GPipe, OneFOneB, Schedule
from lightning_hetero.testing import EmulatedAccelerator, install_accelerator
from lightning_hetero.testing.accelerator import COUNT_VARIABLE

STAGES = 4
LAYERS = 16  # of each stage
WIDTH = 16
MICRO_BATCHES = 8
ROWS = 512  # of a micro-batch
STEPS, QUICK_STEPS = 50, 5
MODES: dict[str, tuple[Schedule | None, bool]] = {  # schedule of whole steps, rematerialize
    "step_1f1b": (OneFOneB(), False),
    "step_gpipe": (GPipe(), False),
    "forward": (None, False),
    "forward_rematerialize": (None, True),
}
# Of one micro-batch in one stage: the stage's input, and the output of each tanh.
KEPT_BYTES = (1 + LAYERS) * ROWS * WIDTH * torch.float32.itemsize


class Model(nn.Module):
    """Stages in a row, and a training step. Input (rows, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(
                nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
                for _ in range(STAGES)
            )
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: D102
        return self.net(batch).pow(2).mean()  # type: ignore[no-any-return]


def micro_batches_alive(accelerator: EmulatedAccelerator, schedule: Schedule | None, again: bool, steps: int) -> Tensor:
    """The most micro-batches whose activations a stage held at once in any step, shape (stages,)."""
    model = Model()
    where = {f"net.{index}": name for index, name in enumerate(accelerator.devices)}
    inventory = resolve_devices(["cpu", *accelerator.devices])
    plan = make_plan(ManualPolicy(where), Problem(graph=find_units(model), inventory=inventory))
    placed = PlacedModel(model, plan, Pipelining(micro_batches=MICRO_BATCHES, rematerialize=again))
    placed.place()
    assert placed.engine is not None
    stepper = None if schedule is None else Stepper(placed.engine, model, "training_step", schedule, (), ())
    mode = placed.reconciler()
    assert mode is not None
    activate(mode)
    batch = torch.randn(MICRO_BATCHES * ROWS, WIDTH)

    def step() -> None:
        if stepper is None:
            model.training_step(batch, 0).backward()
            return
        result = stepper.run((batch, 0), 1.0)
        assert result is not None
        assert result.loss is not None
        result.loss.backward()

    try:
        step()  # finds out what may be cut, and leaves gradients
        peaks = [peak_bytes(accelerator, step) for _ in range(steps)]
        assert not placed.engine.reasons
    finally:
        deactivate(mode)
        if stepper is not None:
            stepper.close()
        placed.release(torch.device("cpu"))
    return torch.tensor(peaks).amax(0) / KEPT_BYTES


def peak_bytes(accelerator: EmulatedAccelerator, step: Callable[[], None]) -> list[int]:
    """How far the memory of each device rises in a step."""
    for index in range(STAGES):
        accelerator.reset(index)
    before = [accelerator.stats(index).used_bytes for index in range(STAGES)]
    step()
    return [accelerator.stats(index).peak_bytes - before[index] for index in range(STAGES)]


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    os.environ[COUNT_VARIABLE] = str(STAGES)
    accelerator = install_accelerator()
    report(
        {
            f"{name}_stage_{stage}": float(alive)
            for name, (schedule, again) in MODES.items()
            for stage, alive in enumerate(
                micro_batches_alive(accelerator, schedule, again, QUICK_STEPS if quick else STEPS)
            )
        }
    )


if __name__ == "__main__":
    main()
