"""Profilers of a Trainer see what they see on one device, and the workers of the devices."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from lightning_hetero.testing.lightning_module import Classifier, data


@pytest.mark.feature("profilers: simple, advanced")
@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler])
def test_actions_are_timed(kind: Any, hostile: Any, tmp_path: Path) -> None:
    trainer = hostile(profiler=kind(tmp_path, "report"))
    trainer.fit(Classifier(), data(), data())
    (path,) = tmp_path.glob("*.txt")
    text = path.read_text()
    for action in (
        "run_training_batch",
        "run_training_epoch",
        "HeteroStrategy.training_step",
        "HeteroStrategy.backward",
    ):
        assert action in text


@pytest.mark.feature("profilers: pytorch", note="Work of the devices is there as hetero/stage1/F3.")
@pytest.mark.parametrize("devices", ["emulated"], indirect=True)
def test_the_torch_profiler_shows_the_work_of_all_devices(hostile: Any, tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "report", export_to_chrome=False, row_limit=-1)
    trainer = hostile(profiler=profiler, max_steps=8, max_epochs=-1, strategy={"micro_batches": 2})
    trainer.fit(Classifier(), data())
    (path,) = tmp_path.glob("*.txt")
    found = set(re.findall(r"hetero/stage\d+/[FB]\d+", path.read_text()))
    assert found == {f"hetero/stage{stage}/{op}{part}" for stage in range(3) for op in "FB" for part in range(2)}
    assert profiler._record_module_names
    assert "experimental_config" not in profiler._profiler_kwargs


@pytest.mark.feature("profilers: pytorch", note="Work of the devices is there as hetero/stage1/F3.")
@pytest.mark.parametrize("devices", ["emulated"], indirect=True)
def test_modules_keep_their_names_where_batches_are_whole(hostile: Any, tmp_path: Path) -> None:
    table = {"row_limit": -1, "table_kwargs": {"max_name_column_width": 200}}
    profiler = PyTorchProfiler(tmp_path, "report", export_to_chrome=True, **table)
    hostile(profiler=profiler, max_epochs=2, strategy={"micro_batches": 1}).fit(Classifier(), data())
    (path,) = tmp_path.glob("*.txt")
    assert "[pl][module]torch.nn.modules.linear.Linear: net.second" in path.read_text()
    assert list(tmp_path.glob("*.json"))


@pytest.mark.feature("profilers: pytorch", note="Work of the devices is there as hetero/stage1/F3.")
def test_profiling_changes_no_result(both: Any) -> None:
    both(Classifier, profiler="pytorch").check_parity()


@pytest.mark.filterwarnings("ignore:Exception ignored in. <function Profiler.__del__")  # Lightning's, of one half made
@pytest.mark.feature("profilers: XLA", "refused", note="By Lightning: it is for TPUs.")
@pytest.mark.parametrize("devices", ["emulated"], indirect=True)
def test_the_xla_profiler_is_refused_by_lightning(hostile: Any) -> None:
    with pytest.raises(ModuleNotFoundError, match="torch_xla"):
        hostile(profiler="xla")
    gc.collect()
