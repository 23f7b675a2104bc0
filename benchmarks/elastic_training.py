"""One of the processes that `elastic.py` watches: it trains, goes on from the last checkpoint, and gets a signal.

    python elastic_training.py FOLDER SIGNAL RANK STEP DELAY

Process RANK sends itself SIGNAL DELAY seconds after step STEP (from 0) has begun, once in all attempts of a launcher.
FOLDER gets the checkpoints, `signalled` with the time of the signal, and for each process `steps-RANK` with a line for
every step that ended: attempt, number of steps so far, time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sleeping import ROWS, Stage
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

PROCESSES = 2
STEPS = 40
STEPS_OF_EPOCH = 15
CHECKPOINT_EVERY = 5  # steps
FORWARD_S = 0.01  # of the rows of a step, over all processes; the backward takes twice that


class Model(pl.LightningModule):
    """A stage that sleeps, so that a signal may meet any part of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Stage(FORWARD_S)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Signal(pl.Callback):
    """Sends this process a signal, once."""

    def __init__(self, number: int, rank: int, step: int, delay_s: float, mark: Path) -> None:
        self.number, self.rank, self.step, self.delay_s, self.mark = number, rank, step, delay_s, mark

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: D102
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step) and not self.mark.exists():
            threading.Timer(self.delay_s, self._send).start()

    def _send(self) -> None:
        self.mark.write_text(str(time.time()))
        os.kill(os.getpid(), self.number)


class Note(pl.Callback):
    """Writes down which steps were made, and when."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: D102
        with (self.folder / f"steps-{trainer.global_rank}").open("a") as file:
            file.write(f"{self.attempt} {trainer.global_step} {time.time()}\n")


def main() -> None:
    folder = Path(sys.argv[1])
    number, rank, step, delay_s = signal.Signals[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    torch.set_num_threads(1)
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        strategy=HeteroStrategy(devices="cpu", hang_timeout_s=60, verbose=False),
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Signal(number, rank, step, delay_s, folder / "signalled"),
            Note(folder),
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=CHECKPOINT_EVERY),
        ],
    )
    data = TensorDataset(torch.randn(STEPS_OF_EPOCH * ROWS, 4))
    trainer.fit(Model(), DataLoader(data, batch_size=ROWS), ckpt_path=str(last) if last.exists() else None)


if __name__ == "__main__":
    main()
