"""Loggers get what they get on one device."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_hetero import HeteroMonitor
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


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: the steps and values of each name."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.feature("loggers: TensorBoardLogger", note="With log_graph and the metrics of HeteroMonitor")
def test_tensorboard_shows_the_same_numbers_and_a_graph(both: Any, tmp_path: Path) -> None:
    class WithExample(Logs):
        example_input_array = torch.zeros(2, 8, dtype=torch.float64)

    def run(trainer: pl.Trainer, model: Any) -> str:
        logger = TensorBoardLogger(tmp_path, name=type(trainer.strategy).__name__, log_graph=True)
        trainer.loggers = [logger]
        fit(trainer, model)
        return str(logger.log_dir)

    sides = both(WithExample, run=run, log_every_n_steps=1)
    sides.check_parity()
    theirs, mine = scalars(sides.alone.result), scalars(sides.spread.result)
    assert {"a_step", "a_epoch", "max", "direct", "epoch"} <= theirs.keys() == mine.keys()
    for tag, events in theirs.items():
        assert [step for step, _ in mine[tag]] == [step for step, _ in events]
        assert [value for _, value in mine[tag]] == pytest.approx([value for _, value in events], rel=0, abs=1e-6)
    graphs = [EventAccumulator(side.result).Reload().Graph() for side in (sides.alone, sides.spread)]
    nodes = [[(node.name.rpartition("/")[0], node.op) for node in graph.node] for graph in graphs]
    operations = [{(where, what) for where, what in found if what.startswith("aten::")} for found in nodes]
    assert {what for _, what in operations[1] - operations[0]} <= {"aten::to"}  # where something moves
    assert operations[0] <= operations[1]
    assert ("WithExample/MLP[net]/Linear[second]", "aten::linear") in operations[0]


@pytest.mark.feature("loggers: TensorBoardLogger", note="With log_graph and the metrics of HeteroMonitor")
def test_tensorboard_gets_what_the_monitor_sees(hostile: Any, devices: Any, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer = hostile(logger=logger, callbacks=[HeteroMonitor(every_n_steps=2)], max_epochs=1)
    trainer.fit(Logs(), data())
    found = scalars(Path(logger.log_dir))
    for name in ("hetero/step_s", "hetero/moved_MB"):
        assert [step for step, _ in found[name]] == list(range(1, trainer.global_step, 2))
    assert all(value > 0 for _, value in found["hetero/step_s"])
    shares = {tag for tag in found if tag.startswith("hetero/busy_share/")}
    used = {f"hetero/busy_share/{device.name}" for device in trainer.strategy.plan.used}
    assert shares == (used if devices.micro_batches else set())


@pytest.mark.feature("loggers: TensorBoardLogger", note="With log_graph and the metrics of HeteroMonitor")
def test_the_default_logger_is_that_of_plain_lightning(hostile: Any, plain: Any) -> None:
    """With TensorBoard installed that is its logger, and the plan is saved beside what it writes."""
    loggers = [make(logger=True, max_steps=1).logger for make in (plain, hostile)]
    assert [type(logger) for logger in loggers] == [TensorBoardLogger] * 2
    trainer = hostile(logger=True, max_steps=1)
    trainer.fit(Classifier(), data())
    assert (Path(trainer.log_dir) / "hetero_plan.json").is_file()
