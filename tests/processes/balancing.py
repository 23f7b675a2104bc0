"""A training in which process 0 needs three times as long for a row. Writes how many rows it saw in each epoch.

python balancing.py FOLDER WORKERS [norm]    with "norm", batch normalisation waits for the slow one in each forward
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jobs import Net, loader
from torch import Tensor

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy


class Slow(Net):
    """Sleeps for every row."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(len(batch[0]) * (0.006 if self.global_rank == 0 else 0.002))
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    model = Slow(norm="norm" in sys.argv)
    trainer = L.Trainer(
        strategy=HeteroStrategy(devices="cpu", hang_timeout_s=60, verbose=False),
        accelerator="cpu",
        max_epochs=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(num_workers=workers, persistent_workers=workers > 0))
    seen = [sorted(model.seen[f"train{epoch}"]) for epoch in range(12)]
    (folder / f"seen-{trainer.global_rank}.json").write_text(json.dumps(seen))
