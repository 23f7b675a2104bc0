"""Trainings that are timed in turns, over a GPU and the CPU, and what is trained."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_hetero import HeteroStrategy
from lightning_hetero.demos.decoder import Decoder
from lightning_hetero.demos.digits import DigitsCNN
from lightning_hetero.plan import Plan
from lightning_hetero.strategy.trial import in_effect

SETTLE, SETTLE_MAP = 60, 12  # steps after which the plan of a run stays; a mapping of modules has no rivals
STEPS = 100  # timed of a run that has settled
LIMIT_S = 1.0  # of a warm-up, and of what is timed
LEAST_WARM = 6  # steps in which cuts are tried out, however long they take

Way = Callable[[], tuple[Any, dict[str, Any]]]
"""Makes the strategy of a Trainer, and its other options."""


class Wide(pl.LightningModule):
    """Equal layers. Input (rows, width)."""

    def __init__(self, width: int, depth: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.Adam(self.parameters(), lr=1e-4)


@dataclass(frozen=True)
class Model:
    """What is trained: a module and its only batch."""

    make: Callable[[], pl.LightningModule]
    batch: Any


def models(large: bool) -> dict[str, Model]:
    """A small one and two that keep a GPU busy; tiny ones otherwise."""
    width, rows, dim, depth, context = (2048, 512, 512, 8, 128) if large else (64, 32, 32, 2, 16)
    tokens = torch.randint(256, (8 if large else 4, context))
    return {
        "cnn": Model(DigitsCNN, (torch.rand(64, 1, 8, 8), torch.randint(10, (64,)))),
        "mlp": Model(lambda: Wide(width), [torch.randn(rows, width)]),
        "decoder": Model(
            lambda: Decoder(dim=dim, depth=depth, heads=8, hidden=4 * dim, context=context),
            (tokens, tokens.roll(-1, 1)),
        ),
    }


class Clock(pl.Callback):
    """Times some steps together, and takes the peak of the GPU in them. Then the training ends.

    Args:
        module: `torch.cuda`, or what is in its place.
        warm: Steps before, fewer if they take more than `LIMIT_S`.
        steps: Steps to time, fewer if they take more than `LIMIT_S`.

    Attributes:
        step_s: Mean seconds of these steps.
        peak_bytes: The most that tensors took on the GPU.
    """

    def __init__(self, module: Any, warm: int, steps: int) -> None:
        self.module, self.warm, self.steps = module, warm, steps
        self.step_s, self.peak_bytes = 0.0, 0
        self._first, self._begun_s = -1, time.perf_counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:  # noqa: D102
        is_late = time.perf_counter() - self._begun_s > LIMIT_S
        if self._first < 0:
            if batch_idx >= self.warm or (is_late and batch_idx >= LEAST_WARM):
                self.module.synchronize(0)
                self.module.reset_peak_memory_stats(0)
                self._first, self._begun_s = batch_idx, time.perf_counter()
        elif not self.step_s and (batch_idx >= self._first + self.steps or is_late):
            self.module.synchronize(0)
            self.step_s = (time.perf_counter() - self._begun_s) / (batch_idx - self._first)
            self.peak_bytes = self.module.max_memory_allocated(0)
            trainer.should_stop = True


@dataclass
class Timed:
    """What the turns of one way to train took."""

    seconds: list[float] = field(default_factory=list)
    peaks_bytes: list[int] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Mean seconds of the steps of the fastest turn."""
        return min(self.seconds)


class Bench:
    """The devices, and how often and how long to measure.

    Args:
        gpu: Name of the GPU.
        quick: Few repetitions.
    """

    def __init__(self, gpu: str, quick: bool) -> None:
        self.gpu, self.kind = gpu, torch.device(gpu).type
        self.is_real = self.kind == "cuda"
        self.module: Any = torch.get_device_module(self.kind)
        self.places = [gpu, "cpu"]
        self.turns, self.warm, self.steps = (2, 6, 8) if quick else (4, 12, 20)
        self.models = models(large=self.is_real)
        # A quick run measures and plans for one model only.
        self.planned = {"mlp": self.models["mlp"]} if quick else self.models

    def train(self, model: Model, steps: int, strategy: Any, callbacks: Any = (), **options: Any) -> None:
        """Train for some steps."""
        torch.manual_seed(0)
        trainer = pl.Trainer(
            strategy=strategy,
            max_epochs=1,
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(model.make(), torch.utils.data.DataLoader([model.batch] * steps, batch_size=None))

    def plain(self) -> tuple[Any, dict[str, Any]]:
        """Lightning on the GPU, without this package. It knows no emulated one, so there it is the CPU."""
        return "auto", {"accelerator": "gpu" if self.is_real else "cpu", "devices": 1}

    def obeying(self, plan: Plan, folder: Path) -> tuple[Any, dict[str, Any]]:
        """What obeys a plan."""
        file = folder / f"{id(plan)}.json"
        file.write_text(plan.to_json())
        return HeteroStrategy(devices=self.places, plan=file, profile="never", verbose=False), {}

    def settle(self, model: Model, placement: Any, **strategy: Any) -> Plan:
        """The plan that a policy has come to once the model is measured, and real steps have decided."""
        chosen = HeteroStrategy(devices=self.places, placement=placement, profile="always", verbose=False, **strategy)
        self.train(model, SETTLE_MAP if isinstance(placement, dict) else SETTLE, chosen)
        assert chosen.plan is not None
        return chosen.plan

    def compare(self, model: Model, ways: dict[str, Way], *, settled: bool = False) -> dict[str, Timed]:
        """Time ways to train a model in turns; the first turn brings what stays, such as workspaces of cuBLAS.

        Args:
            model: What is trained.
            ways: How, by name.
            settled: Whether to let the steps pass first in which a run looks for the best plan, and to time more.
        """
        warm, steps = (max(self.warm, SETTLE), STEPS) if settled else (self.warm, self.steps)
        found = {name: Timed() for name in ways}
        for turn in range(self.turns + 1):
            for name, make in ways.items():
                gc.collect()
                self.module.synchronize(0)
                before = self.module.memory_allocated(0)
                clock = Clock(self.module, warm, steps)
                strategy, options = make()
                self.train(model, warm + steps + 1, strategy, [clock], **options)
                if turn:
                    found[name].seconds.append(clock.step_s)
                    found[name].peaks_bytes.append(clock.peak_bytes - before)
        return found

    def compare_plans(self, model: Model, plans: dict[str, Plan], folder: Path) -> dict[str, Timed]:
        """Time plans in turns; those that are the same in effect share their times."""
        same: dict[str, str] = {}
        for name, plan in plans.items():
            same.setdefault(repr(in_effect(plan)), name)
        ways: dict[str, Way] = {name: partial(self.obeying, plans[name], folder) for name in same.values()}
        found = self.compare(model, ways)
        return {name: found[same[repr(in_effect(plan))]] for name, plan in plans.items()}
