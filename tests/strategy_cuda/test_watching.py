"""Monitors, profilers and the table of layers know both the GPU and the CPU."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, ModelSummary
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor, nn

from lightning_hetero import HeteroMonitor
from lightning_hetero.testing.lightning_module import Classifier, data


class Quiet(Classifier):
    """Logs nothing of its own."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Recorded(Classifier):
    """Records its fifth step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.block = self.trainer.strategy.recording()
            self.recording = self.block.__enter__()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.block.__exit__(None, None, None)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [*csv.DictReader(file)]


@pytest.mark.parametrize("named", ["auto", "hetero"])
def test_the_device_monitor_tells_of_both(named: str, places: list[str], gpu: Any, over: Any, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    options = {"accelerator": named, "logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
    over(places, callbacks=[DeviceStatsMonitor(cpu_stats=True)], **options).fit(Quiet(), data())
    (last, *_) = rows_of(tmp_path)[::-1]
    moment = "DeviceStatsMonitor.on_train_batch_end"
    assert float(last[f"{moment}/{gpu.name}/allocated_bytes.all.current"]) > 0
    assert any(name.startswith(f"{moment}/cpu/") or name == f"{moment}/cpu_percent" for name in last)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_our_monitor_tells_of_both(micro_batches: int, places: list[str], gpu: Any, over: Any, tmp_path: Path) -> None:
    options = {"logger": CSVLogger(tmp_path), "callbacks": [HeteroMonitor(1)], "max_epochs": 2}
    model = Quiet()
    trainer = over(places, strategy={"micro_batches": micro_batches}, **options)
    trainer.fit(model, data())
    there = [name for name, device in trainer.strategy.plan.device_of.items() if device == gpu.name]
    weights_bytes = sum(p.nbytes for name in there for p in model.get_submodule(name).parameters())
    steps = [row for row in rows_of(tmp_path) if row["hetero/step_s"]]
    assert len(steps) == 10
    for row in steps[4:]:
        assert float(row["hetero/step_s"]) > 0
        # Inputs or outputs of 8 rows and 16 features cross a border, and their gradients.
        assert float(row["hetero/moved_MB"]) * 1e6 >= 2 * 8 * 16 * 8
        assert float(row[f"hetero/memory_MB/{gpu.name}"]) * 1e6 >= weights_bytes
        if micro_batches > 1:
            shares = [float(row[f"hetero/busy_share/{place}"]) for place in places]
            assert all(0 < share <= 1 for share in shares)
            assert float(row["hetero/bubble_share"]) == pytest.approx(1 - sum(shares) / 2)


def test_the_torch_profiler_shows_the_work_of_both(places: list[str], over: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "report", export_to_chrome=False, row_limit=-1)
    strategy = {"micro_batches": 2}
    over(places, strategy=strategy, profiler=profiler, max_steps=8, max_epochs=-1).fit(Classifier(), data())
    (path,) = tmp_path.glob("*.txt")
    found = set(re.findall(r"hetero/stage\d+/[FB]\d+", path.read_text()))
    assert found == {f"hetero/stage{stage}/{op}{part}" for stage in range(3) for op in "FB" for part in range(2)}


def test_the_table_of_layers_says_where_they_are(
    places: list[str], over: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = over(places, callbacks=[ModelSummary(max_depth=2)], max_epochs=1)
    trainer.fit(Classifier(), data())
    (text,) = (record.message for record in caplog.records if "Trainable params" in record.message)
    assert "Params per Device" in text
    for name, count in {"net.first": 144, "net.second": 272, "net.third": 68}.items():
        assert re.search(rf"{name} .*\| {count} {trainer.strategy.plan.device_of[name]} ", text), text


def test_a_recording_tells_which_device_did_what(places: list[str], over: Any) -> None:
    model = Recorded()
    trainer = over(places, strategy={"micro_batches": 4}, max_epochs=1)
    trainer.fit(model, data())
    records = model.recording.records
    assert {(record.unit, record.device) for record in records} == set(trainer.strategy.plan.device_of.items())
    assert {record.micro_batch for record in records} == set(range(4))
    assert {record.op for record in records} == {"F", "B"}


@pytest.mark.cuda
def test_a_recording_has_the_time_of_kernels_and_not_that_of_their_launch(over: Any) -> None:
    class Long(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch.cuda._sleep(20_000_000)  # 10 ms at 2 GHz
            return super().forward(x)

    model = Recorded()
    model.net.second = Long(16, 16).double()
    strategy = {"micro_batches": 2, "placement": {"net.second": "cuda:0", "": "cpu"}}
    over(["cpu", "cuda:0"], strategy=strategy, max_epochs=1).fit(model, data())
    took_s = [r.end_s - r.start_s for r in model.recording.records if r.device == "cuda:0" and r.op == "F"]
    assert took_s
    assert max(took_s) > 5e-3
