"""`HeteroMonitor` sends what the devices do to the loggers of the Trainer."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_hetero
from lightning_hetero import HeteroMonitor
from lightning_hetero.errors import UsageError
from lightning_hetero.testing import EmulatedAccelerator

ROWS = 10
MakeTrainer = Callable[..., pl.Trainer]


class Two(pl.LightningModule):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).double()
        self.fails = fails

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.fails and batch_idx == 2:
            raise ValueError("the third batch")
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(6 * ROWS, 8, dtype=torch.float64)), batch_size=ROWS)


def logged(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [row for row in csv.DictReader(file) if row["hetero/step_s"]]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bytes_and_memory_are_those_of_the_theory(
    hetero: MakeTrainer, accelerator: EmulatedAccelerator, tmp_path: Path, micro_batches: int
) -> None:
    device = accelerator.devices[0]
    trainer = hetero(
        devices=["cpu", device],
        placement={"net.0": device, "net.1": "cpu"},
        strategy={"micro_batches": micro_batches},
        logger=CSVLogger(tmp_path),
        callbacks=[HeteroMonitor(every_n_steps=2)],
        max_epochs=1,
    )
    trainer.fit(Two(), data())
    rows = logged(tmp_path)

    assert [row["step"] for row in rows] == ["1", "3", "5"]
    output_bytes = ROWS * 16 * 8
    for row in rows[micro_batches - 1 :]:  # a step in which the cut is tried moves more
        assert float(row["hetero/moved_MB"]) * 1e6 == ROWS * 8 * 8 + 2 * output_bytes  # inputs; outputs, and back
        assert float(row[f"hetero/memory_MB/{device}"]) * 1e6 >= (8 * 16 + 16) * 8 + output_bytes
        assert float(row["hetero/step_s"]) > 0
    assert ("hetero/bubble_share" in rows[0]) == (micro_batches > 1)  # else one device after the other, by the plan


def test_devices_that_work_in_micro_batches_are_compared(hetero: MakeTrainer, tmp_path: Path) -> None:
    trainer = hetero(
        devices="cpu@speed=1,cpu@speed=1",
        placement="even",
        strategy={"micro_batches": 2},
        logger=CSVLogger(tmp_path),
        callbacks=[HeteroMonitor()],
        log_every_n_steps=3,
        max_epochs=1,
    )
    trainer.fit(Two(), data())
    rows = logged(tmp_path)

    assert [row["step"] for row in rows] == ["2", "5"]
    for row in rows:
        busy = [float(value) for name, value in row.items() if name.startswith("hetero/busy_share/")]
        assert len(busy) == 2
        assert all(0 < share <= 1 for share in busy)
        assert float(row["hetero/bubble_share"]) == pytest.approx(1 - sum(busy) / 2)


def test_results_are_the_same_with_and_without(hetero: MakeTrainer, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [HeteroMonitor(1)]):
        torch.manual_seed(0)
        model = Two()
        hetero(strategy={"micro_batches": 2}, logger=CSVLogger(tmp_path), callbacks=callbacks).fit(model, data())
        weights.append(model.state_dict()["net.0.weight"])

    assert torch.equal(*weights)


def test_after_an_exception_nothing_is_watched_any_more(hetero: MakeTrainer, tmp_path: Path) -> None:
    monitor = HeteroMonitor(1)
    options = {"strategy": {"micro_batches": 2}, "logger": CSVLogger(tmp_path), "callbacks": [monitor]}
    with pytest.raises(ValueError, match="the third batch"):
        hetero(**options).fit(Two(fails=True), data())
    assert lightning_hetero.runtime.meter.running == []

    hetero(**options).fit(Two(), data())


def test_a_trainer_without_the_strategy_or_a_logger_is_refused(hetero: MakeTrainer, plain: MakeTrainer) -> None:
    with pytest.raises(UsageError, match=r"this Trainer has SingleDeviceStrategy\. Set the strategy"):
        plain(callbacks=[HeteroMonitor()]).fit(Two(), data())
    with pytest.raises(UsageError, match=r"there are none\. Give it one, such as"):
        hetero(callbacks=[HeteroMonitor()]).fit(Two(), data())


@pytest.mark.parametrize("every", [0, 2.5, "often"])
def test_a_number_that_means_nothing_is_refused(every: Any) -> None:
    with pytest.raises(UsageError, match="must be a whole number from 1 on, or None"):
        HeteroMonitor(every)
