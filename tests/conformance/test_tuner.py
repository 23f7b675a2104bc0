"""The tuner finds what it finds on one device, and takes the memory of any device for a limit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data


class Tuned(Classifier):
    """Has what the tuner sets."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-2
        self.batch_size = 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return data(rows=256, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return data()


@pytest.mark.feature("tuner: lr_find")
@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_the_learning_rate(mode: str, both: Any) -> None:
    def run(trainer: pl.Trainer, model: Any) -> Any:
        found = Tuner(trainer).lr_find(model, data(), num_training=15, max_lr=0.1, mode=mode, update_attr=False)
        trainer.fit(model, data())
        return [*found.results["lr"], *found.results["loss"], model.lr]

    sides = both(Tuned, run=run)
    sides.check_parity()
    assert sides.spread.result == pytest.approx(sides.alone.result, rel=0, abs=1e-12)


@pytest.mark.feature("tuner: scale_batch_size")
@pytest.mark.parametrize("devices", ["accelerator"], indirect=True)
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_out_of_memory_of_any_device_is_the_limit(mode: str, hostile: Any, accelerator: EmulatedAccelerator) -> None:
    accelerator.configure(0, cap_bytes=25_000)
    model = Tuned()
    strategy = {"devices": ["cpu", *accelerator.devices[:2]], "micro_batches": 1}
    trainer = hostile(strategy=strategy, max_epochs=1, limit_val_batches=0)
    found = Tuner(trainer).scale_batch_size(model, mode=mode, steps_per_trial=1, max_trials=9)
    accelerator.reset()
    assert 2 <= found < 256
    assert model.batch_size == found
