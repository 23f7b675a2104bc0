"""Loggers get what they get on one device."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor

from lightning_hetero.testing.lightning_module import Classifier, data


class Logs(Classifier):
    """Logs in all the ways there are."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"a": loss, "b": loss.detach() * 2}, on_step=True, on_epoch=True)
        self.log("max", self(batch[0]).max(), reduce_fx="max", on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
        return loss


class Memory(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    name, version = "memory", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("metrics", (sorted(metrics), step)))

    def log_hyperparams(self, params: Any, *_: Any) -> None:
        self.calls.append(("hyperparameters", dict(params)))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.calls.append(("checkpoint", checkpoint_callback.best_model_score is not None))

    def finalize(self, status: str) -> None:
        self.calls.append(("finalize", status))


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def fit(trainer: pl.Trainer, model: Any) -> None:
    trainer.fit(model, data(), data())


@pytest.mark.feature("loggers: CSVLogger, several loggers, hyperparameters")
def test_the_same_numbers_in_the_same_rows(both: Any, tmp_path: Path) -> None:
    def run(trainer: pl.Trainer, model: Any) -> None:
        trainer.loggers = [CSVLogger(tmp_path / type(trainer.strategy).__name__), Memory()]
        fit(trainer, model)

    sides = both(Logs, run=run, log_every_n_steps=1)
    sides.check_parity()
    mine, theirs = rows(tmp_path / "HeteroStrategy"), rows(tmp_path / "SingleDeviceStrategy")
    assert len(mine) == len(theirs) > 10
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == value == "" or float(one[key]) == pytest.approx(float(value), rel=0, abs=1e-12)
    assert sides.spread.trainer.loggers[1].calls == sides.alone.trainer.loggers[1].calls


@pytest.mark.feature("loggers: log_model, the hooks of a logger")
def test_a_logger_is_told_of_hyperparameters_and_checkpoints(both: Any, tmp_path: Path) -> None:
    loggers = iter([Memory(), Memory()])
    seen: list[Memory] = []

    class Keeps(Logs):
        def on_train_start(self) -> None:
            seen.append(self.logger)

    def run(trainer: pl.Trainer, model: Any) -> None:
        trainer.loggers = [next(loggers)]
        fit(trainer, model)

    both(Keeps, run=run, enable_checkpointing=True, log_every_n_steps=1).check_parity()
    assert seen[1].calls == seen[0].calls
    kinds = {kind for kind, _ in seen[0].calls}
    assert kinds == {"metrics", "hyperparameters", "checkpoint", "finalize"}
    assert ("hyperparameters", {"width": 3}) in seen[1].calls


@pytest.mark.feature("loggers: self.logger.experiment")
def test_the_experiment_of_a_logger(hostile: Any, tmp_path: Path) -> None:
    class Writes(Classifier):
        def on_train_epoch_end(self) -> None:
            self.logger.experiment.log_metrics({"mine": 1.0}, step=self.global_step)

    hostile(logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(Writes(), data())
    assert any(row.get("mine") == "1.0" for row in rows(tmp_path))
