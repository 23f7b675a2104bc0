"""A training in which something happens to one process. Run as a program, it is one of the processes.

python failing.py WHAT RANK STEP FOLDER      what happens to which process before which step
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jobs import Net, Numbers, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy


class Happens(L.Callback):
    """Does it, once in all attempts of a launcher."""

    def __init__(self, what: str, rank: int, step: int, folder: Path) -> None:
        self.what, self.rank, self.step, self.mark = what, rank, step, folder / "happened"

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step) or self.mark.exists():
            return
        self.mark.write_text(str(time.time()))
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.what == "error":
            raise ValueError("the dog ate this row")


class Raw(Net):
    """Runs the backward itself."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch, "raw").backward()
        optimizer.step()


class Measured(Net):
    """Logs a metric of torchmetrics, which all processes compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean(self.loss(batch, "val"))
        self.log("val", self.mean)


class Note(L.Callback):
    """Says which steps were done, and when."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        with (self.folder / f"steps-{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {time.time()}\n")


def main(what: str, rank: int, step: int, folder: Path) -> None:
    torch.set_num_threads(1)
    this = int(os.environ["RANK"])
    model = {"raw": Raw, "metric": Measured}.get(what, Net)()
    data: DataLoader[Any] = loader()
    shares: list[float] | None = None
    if what == "lengths" and this == rank:
        data = DataLoader(Numbers(31), batch_size=10)
    if what == "model" and this == rank:
        model.net[0] = torch.nn.Linear(8, 16, bias=False).double()
    if what == "steps" and this == rank:
        data = DataLoader(Numbers(21), batch_size=10)
    if what == "shares" and this == rank:
        shares = [1, 2]
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=1)
    trainer = L.Trainer(
        strategy=HeteroStrategy(devices="cpu", shares=shares, hang_timeout_s=30, verbose=False),
        accelerator="cpu",
        use_distributed_sampler=what != "steps",
        max_steps=30,
        max_epochs=100,
        logger=False,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Happens(what, rank, step, folder), Note(folder), checkpoints],
    )
    last = folder / "last.ckpt"
    validation = DataLoader(Numbers(5), batch_size=1) if what in ("validation", "metric") else None
    trainer.fit(model, data, validation, ckpt_path=str(last) if last.exists() else None)
    print(f"process {this} is done after {trainer.global_step} steps")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
