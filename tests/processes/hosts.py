"""A training on two hosts. Run as a program, it is the process of one of them; imported, it is also the one alone.

python hosts.py STEPS FOLDER     writes FOLDER/steps-RANK while it runs, FOLDER/RANK.pt at the end
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jobs import Numbers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

LINK = "hetero"
"""Name of the network interface between the hosts, on both."""
WIDTH = 256


class Wide(L.LightningModule):
    """Two layers, with 2 MB of parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(WIDTH, 512), nn.Tanh(), nn.Linear(512, WIDTH)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


class Sent(L.Callback):
    """How many bytes this host had sent over the link after each step."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.counter = Path(f"/sys/class/net/{LINK}/statistics/tx_bytes")
        self.sent_bytes: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.sent_bytes.append(int(self.counter.read_text()))
        with self.file.open("a") as file:
            file.write(f"{trainer.global_step}\n")


def train(steps: int, nodes: int = 1, folder: Path | None = None) -> dict[str, Any]:
    """The training, on this host and the others of the launcher."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    model = Wide(seed=rank)  # hosts begin with different numbers, and host 0 decides
    sent = Sent(folder / f"steps-{rank}") if folder else None
    strategy = HeteroStrategy(devices="cpu", hang_timeout_s=10, verbose=False)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        num_nodes=nodes,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[sent] if sent else [],
    )
    trainer.fit(model, DataLoader(Numbers(shape=(WIDTH,)), batch_size=10))
    assert strategy.plan is not None
    return {
        "state": model.state_dict(),
        "notes": strategy.plan.notes,
        "sent_bytes": sent.sent_bytes if sent else [],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    torch.save(train(int(sys.argv[1]), 2, folder), folder / f"{os.environ['RANK']}.pt")
