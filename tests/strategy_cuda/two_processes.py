"""A training in several processes, each with a device of its own. Run as a program, it is one of the processes.

python two_processes.py FOLDER DEVICE[,DEVICE...]     writes FOLDER/RANK.pt; the device of each rank, in order
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroStrategy
from lightning_hetero.testing import install_accelerator
from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier


class Logs(Classifier):
    """Logs the loss of the rows of all processes."""

    def __init__(self) -> None:
        super().__init__("mlp", sgd)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))


def batches() -> DataLoader[Any]:
    """53 rows: the last batch is uneven."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(53, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(4, (53,), generator=generator)), batch_size=10, shuffle=True)


def train(devices: Any, folder: Path, **strategy: Any) -> dict[str, Any]:
    """Three epochs."""
    torch.set_num_threads(1)
    chosen = HeteroStrategy(devices=devices, hang_timeout_s=60, verbose=False, **strategy)
    model = Logs()
    trainer = pl.Trainer(
        strategy=chosen,
        max_epochs=3,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(3)
    trainer.fit(model, batches())
    assert chosen.plan is not None
    return {
        "losses": model.losses,
        "state": {name: value.cpu() for name, value in model.state_dict().items()},
        "devices": chosen.plan.torch_devices,
    }


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    rank = int(os.environ["RANK"])
    if any(name.startswith("dev") for name in names):
        install_accelerator()
    shares = [3.0, 1.0] if len(sys.argv) > 3 else None
    torch.save(train([names[rank]], folder, shares=shares), folder / f"{rank}.pt")
