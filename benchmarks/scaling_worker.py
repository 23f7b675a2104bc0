"""What one of the processes of `scale.py` does: it trains, and says what a step took."""

from __future__ import annotations

import itertools
import logging
import os
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import lightning.pytorch as pl
import torch
from launched import environment
from sleeping import Nap
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

LAYERS = 4
PARAMETERS = 2**16  # of a layer: 1 MiB of float32 gradients in all
WARM_STEPS = 2


@dataclass(frozen=True)
class Training:
    """One turn of a configuration.

    Attributes:
        size: How many processes take part.
        port: Where they meet.
        shares: How much of a batch each of them gets.
        slower: How many times as long each of them needs for a row.
        rows: Of a batch, over all processes.
        row_s: Seconds that forward and backward of a row take in a process that is not slower.
        steps: How many are timed.
    """

    size: int
    port: int
    shares: list[float]
    slower: list[float]
    rows: int
    row_s: float
    steps: int


@dataclass(frozen=True)
class Answer:
    """What a process says.

    Attributes:
        step_s: Seconds of each timed step, from its beginning to that of the next.
        gradient_bytes: Of all gradients of the model.
    """

    step_s: list[float]
    gradient_bytes: int


class Layer(nn.Module):
    """Parameters that are summed over the processes, and a nap for each row. Shape (rows, 4)."""

    def __init__(self, row_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(PARAMETERS))
        self.forward_s = row_s / 3  # the backward of a nap is twice as long

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return Nap.apply(x * self.weight.mean(), self.forward_s)  # type: ignore[no-any-return, no-untyped-call]


class Model(pl.LightningModule):
    """Layers that sleep."""

    def __init__(self, row_s: float) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Layer(row_s / LAYERS) for _ in range(LAYERS)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stopwatch(pl.Callback):
    """Notes when steps begin, and how many bytes of gradients there are."""

    def __init__(self) -> None:
        self.begun_s: list[float] = []
        self.gradient_bytes = 0

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: D102
        self.begun_s.append(time.perf_counter())

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:  # noqa: D102
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_bytes = sum(gradient.nbytes for gradient in gradients)


def take_part(training: Training, rank: int, pipe: Connection) -> None:
    """Be one of the processes of a training, and send an `Answer`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (".*does not have many workers", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=advice)
    torch.set_num_threads(1)
    os.environ.update(environment(rank, training.size, training.port))
    watch = Stopwatch()
    steps = WARM_STEPS + training.steps + 1
    data = TensorDataset(torch.randn(steps * training.rows, 4))
    trainer = pl.Trainer(
        strategy=HeteroStrategy(
            devices="cpu", shares=training.shares if training.size > 1 else None, hang_timeout_s=60, verbose=False
        ),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(Model(training.row_s * training.slower[rank]), DataLoader(data, batch_size=training.rows))
    begun_s = watch.begun_s[WARM_STEPS:]
    step_s = [after - before for before, after in itertools.pairwise(begun_s)]
    pipe.send(Answer(step_s, watch.gradient_bytes))
