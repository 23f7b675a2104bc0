"""What is found out about a GPU, and what a run without any argument does with it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hetero import HeteroStrategy, Inventory
from lightning_hetero.cli import main
from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule
from lightning_hetero.devices import discover, measured_inventory, resolve_devices
from lightning_hetero.devices.origins import LOW_CONFIDENCE, MEASURED

GIB = 1 << 30
ACCURATE = 0.9  # what the digits reach in three epochs


@pytest.fixture(autouse=True)
def cache_home(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightning_hetero"


def test_the_gpu_is_found_with_its_memory_and_dtypes(gpu: Any) -> None:
    found = discover()
    device = found[gpu.name]
    properties = gpu.module.get_device_properties(0)
    assert device in found.trainable
    assert found.names[-1] == "cpu"
    assert device.torch_device == gpu.name
    assert 0 < device.memory_bytes <= (device.total_memory_bytes or 0)
    if gpu.is_real:
        assert found.root == device
        assert device.label == properties.name
        assert device.total_memory_bytes == properties.total_memory
        assert {"float64", "float32", "float16", "bfloat16"} <= {*device.dtypes}
        assert device.memory_bytes > GIB


def test_everything_is_measured_kept_and_not_measured_again(
    gpu: Any, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_s = time.perf_counter()
    inventory = measured_inventory(resolve_devices([gpu.name, "cpu"]))
    print(f"measuring {gpu.name} and the CPU took {time.perf_counter() - begun_s:.1f} s")  # the promise is 5
    device = inventory[gpu.name]
    rates = dict(device.flops_per_s)
    assert {"float32", "float64"} <= rates.keys()
    assert all(rate > 0 for rate in rates.values()), rates
    assert device.memory_bytes_per_s
    assert device.launch_s
    assert device.measured in (MEASURED, LOW_CONFIDENCE)
    if gpu.is_real:
        assert rates["float16"] > rates["float32"] > dict(inventory["cpu"].flops_per_s)["float32"], rates
        assert device.speed > 1 == inventory["cpu"].speed
    for ends in ((gpu.name, "cpu"), ("cpu", gpu.name)):
        link = inventory.link(*ends)
        assert link.bandwidth_bytes_per_s, ends
        assert link.latency_s, ends
        assert link.measured in (MEASURED, LOW_CONFIDENCE)
        if gpu.is_real:  # between the CPU and page-locked memory the card copies by itself
            assert link.pinned_bandwidth_bytes_per_s, ends
            assert link.pinned_bandwidth_bytes_per_s >= 0.9 * link.bandwidth_bytes_per_s, (ends, link)
    print(inventory)
    trusted = [item for item in (*inventory, *inventory.links) if item.measured == MEASURED]
    if len(trusted) == len(inventory) + 2:  # what is of low confidence is measured again
        monkeypatch.setattr("lightning_hetero.devices.measure.measure", None)
        again = measured_inventory(resolve_devices([gpu.name, "cpu"]))
        assert dict(again[gpu.name].flops_per_s) == rates
    assert [*cache_home.rglob("*.json")] or not trusted


def test_the_command_line_measures(gpu: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["devices", "--devices", f"{gpu.name},cpu", "--measure"]) == 0
    table = capfd.readouterr().out
    assert gpu.name in table
    assert "GFLOP/s" in table
    assert main(["devices", "--devices", f"{gpu.name},cpu", "--measure", "--json"]) == 0
    read = Inventory.from_dict(json.loads(capfd.readouterr().out))
    assert read.names == (gpu.name, "cpu")
    assert dict(read[gpu.name].flops_per_s)


def digits(trainer: pl.Trainer) -> float:
    """Accuracy on the test set after three epochs."""
    torch.manual_seed(0)
    model, images = DigitsCNN(), DigitsDataModule(seed=1)
    trainer.fit(model, images)
    (metrics,) = trainer.test(model, images, verbose=False)
    return float(metrics["test/acc"])


@pytest.mark.parametrize("gpu", [pytest.param("cuda:0", marks=pytest.mark.cuda)], indirect=True)
def test_a_run_without_arguments_is_that_of_plain_lightning(gpu: Any, quiet: dict[str, Any]) -> None:
    """The first plan knows sizes only, and puts a model that fits on the card alone."""
    accuracy = []
    for strategy in ("auto", "hetero"):
        trainer = pl.Trainer(**{**quiet, "max_epochs": 3, "strategy": strategy})
        accuracy.append(digits(trainer))
    plan = trainer.strategy.plan  # type: ignore[attr-defined]
    assert plan.torch_devices == ("cuda:0",), plan
    assert min(accuracy) > ACCURATE, accuracy
    assert abs(accuracy[0] - accuracy[1]) <= 0.02, accuracy  # cuDNN may choose other algorithms in each run


@pytest.mark.slow
def test_auto_leaves_a_small_model_on_one_device_and_says_why(gpu: Any, quiet: dict[str, Any]) -> None:
    devices: Any = "auto" if gpu.is_real else [gpu.name, "cpu"]
    strategy = HeteroStrategy(devices=devices, profile="always", verbose=False)
    trainer = pl.Trainer(**{**quiet, "max_epochs": 3, "strategy": strategy})
    assert digits(trainer) > ACCURATE
    plan = strategy.plan
    assert plan is not None
    assert plan.notes, "the plan gives no reason"
    print(*plan.notes, sep="\n")
    if gpu.is_real:
        assert plan.torch_devices == ("cuda:0",), plan.notes
        assert any("cuda:0" in note or "single" in note or "one device" in note for note in plan.notes), plan.notes
