"""One of two processes that save, resume, and at last meet a damaged checkpoint; started by `test_processes.py`.

python resuming.py FOLDER     prints what became of it, as a line of JSON
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

RANK = int(os.environ.get("RANK", "0"))


class Noisy(L.LightningModule):
    """Each process draws for the rows that it has."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):  # the same weights, and the numbers to come stay each process's own
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.mse_loss(self.net(x + random.random() * np.random.rand()), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def begin(seed: int) -> None:
    """Each process with numbers of its own."""
    random.seed(seed + RANK)
    np.random.seed(seed + RANK)
    torch.manual_seed(seed + RANK)


def fit(epochs: int, *callbacks: Any, ckpt_path: Path | None = None) -> Noisy:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Noisy()
    trainer = L.Trainer(
        strategy=HeteroStrategy(devices="cpu", shares=[1, 1], hang_timeout_s=40, verbose=False),
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, x[:, :1]), batch_size=8, shuffle=True), ckpt_path=ckpt_path)
    return model


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def resume(folder: Path) -> dict[str, Any]:
    begin(10)
    whole = fit(3, ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"))
    checkpoint = folder / "epoch=0.ckpt"
    begin(20)
    resumed = fit(3, ckpt_path=checkpoint)
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    states = torch.load(checkpoint, weights_only=True)["lightning_hetero"]["random_states"]
    return {
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "processes": len(states),
        "alike": torch.equal(states[0]["torch"]["cpu"], states[1]["torch"]["cpu"]),
        "files": sorted(path.name for path in folder.iterdir() if not path.name.startswith("copy")),
    }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print(json.dumps(resume(where)), flush=True)
    own = where / f"copy-{RANK}.ckpt"  # as if each host had its own
    own.write_bytes((where / "epoch=0.ckpt").read_bytes())
    if RANK == 1:
        damage(own)
    fit(3, ckpt_path=own)
