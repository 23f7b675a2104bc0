"""After a sweep there is a table, and `sweep.csv` with a row for every job, those that failed too."""

from __future__ import annotations

import csv
import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero import Plan
from lightning_hetero.cli.sweep import records
from lightning_hetero.cli.sweep_row import SweepRow, plan_hash, read_rows, varied

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval.*"),
]
BRIEF = (
    "experiment=digits",
    "devices=emulated",
    "trainer.max_epochs=1",
    "+trainer.limit_train_batches=6",
    "+trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=2",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_model_summary=false",
)
# Parameters, gradients and optimizer state of the model are 976 KiB; an even split needs 534 KiB of one device.
TIGHT = r"devices.memory={emulated\:0: 600KiB, emulated\:1: 600KiB, emulated\:2: 600KiB}"

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of_csv() -> list[dict[str, str]]:
    (path,) = Path().glob("multirun/*/*/sweep.csv")
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def has_a_chart() -> bool:
    return all(importlib.util.find_spec(name) for name in ("matplotlib", "lightning_hetero.report"))


def test_what_fails_is_a_row_and_the_sweep_goes_on(command: Command) -> None:
    outcome = command("train", "-m", *BRIEF, TIGHT, "placement=single,manual,even")
    assert outcome.code == 1
    single, manual, even = rows_of_csv()
    assert [row["job"] for row in (single, manual, even)] == ["0", "1", "2"]
    assert [row["placement"] for row in (single, manual, even)] == ["single", "manual", "even"]
    assert (single["status"], manual["status"], even["status"]) == ("infeasible", "failed", "ok")
    assert "600 KiB" in single["reason"]
    assert manual["reason"].startswith("placement 'manual' needs a device map")
    assert even["reason"] == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith(
        "lightning-hetero train: 2 of 3 jobs came to nothing; the reasons are in"
    )

    plan = Plan.from_json((outcome.folders[2] / "logs" / "hetero_plan.json").read_text())
    assert even["plan_hash"] == plan_hash(plan)
    assert float(even["measured_step_s"]) > 0
    assert float(even["predicted_step_s"]) > 0
    assert float(even["samples_per_s"]) * float(even["measured_step_s"]) == pytest.approx(64, rel=0.5)
    peaks = [int(even[f"predicted_peak_bytes/emulated:{index}"]) for index in range(3)]
    assert all(peak > stage.need.total_bytes for peak, stage in zip(peaks, plan.stages, strict=True))
    assert even["metric_name"] == "val/loss"
    assert 0 < float(even["metric"]) < 5
    assert "placement=even" in even["overrides"]

    assert "Sweep of 3 jobs" in outcome.out
    assert "job 1 failed: placement 'manual' needs a device map" in outcome.out
    assert any(line.split("│")[1:4] == ["   0 ", " single    ", " infeasible "] for line in outcome.out.splitlines())
    assert [*Path().glob("multirun/*/*/sweep.png")] != [] or not has_a_chart()


def test_a_mistake_in_the_users_code_is_a_row_with_its_type_and_a_traceback_in_the_log(command: Command) -> None:
    Path("picky.py").write_text(
        "from lightning_hetero.demos.digits import DigitsCNN\n"
        "class Picky(DigitsCNN):\n"
        "    def __init__(self, lr):\n"
        "        super().__init__(lr=lr)\n"
        "        self.bad = lr > 1\n"
        "        assert lr < 9\n"
        "    def training_step(self, batch, index):\n"
        "        if self.bad:\n"
        "            raise ZeroDivisionError('that much')\n"
        "        return super().training_step(batch, index)\n"
    )
    outcome = command("train", "-m", *BRIEF, "model._target_=picky.Picky", "+model.lr=2.0,0.01,9.0")
    bad, good, unmade = rows_of_csv()
    assert outcome.code == 1
    assert (bad["status"], bad["reason"], bad["model.lr"]) == ("failed", "ZeroDivisionError: that much", "2.0")
    assert (good["status"], good["model.lr"]) == ("ok", "0.01")
    assert "raise ZeroDivisionError('that much')" in (outcome.folders[0] / "train.log").read_text()
    assert unmade["reason"].startswith("Error in call to target 'picky.Picky'")
    assert "assert lr < 9" in (outcome.folders[2] / "train.log").read_text()
    gc.collect()
    assert [thing for thing in gc.get_objects() if type(thing).__name__ == "Picky"] == []


def test_speed_can_be_what_a_sweep_looks_for_and_old_rows_are_forgotten(command: Command) -> None:
    words = (*BRIEF, "hydra.sweep.dir=multirun/a/b", "optimized_metric=hetero/samples_per_s")
    stale = Path("multirun/a/b/sweep_rows/7.json")
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    assert command("train", "-m", *words, "trainer.strategy=auto").code == 0
    (row,) = rows_of_csv()
    assert row["metric"] == row["samples_per_s"] != ""
    assert (row["plan_hash"], row["predicted_step_s"]) == ("", "")  # nobody made a plan


def test_a_word_that_is_wrong_ends_a_sweep_before_it_begins(command: Command) -> None:
    outcome = command("train", "-m", *BRIEF, "placement=single,evn")
    assert (outcome.code, outcome.folders) == (1, [])
    assert "Did you mean 'even'?" in outcome.err
    assert not [*Path().glob("multirun/*/*/sweep.csv")]


def test_rows_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        SweepRow(job=number, overrides=["seed=1"]).write(tmp_path)
    assert [row.job for row in read_rows(tmp_path)] == [1, 9, 10]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


def test_columns_are_what_varied_and_all_devices() -> None:
    one = SweepRow(job=0, overrides=["seed=1", "placement=even"], peak_bytes={"cuda:0": 5})
    two = SweepRow(job=1, overrides=["seed=1", "placement=auto", "+x=3"], predicted_peak_bytes={"cpu": 7})
    assert varied([one, two]) == ["placement", "x"]
    first, second = records([one, two])
    assert [*first] == [*second]
    assert (first["peak_bytes/cuda:0"], second["peak_bytes/cuda:0"], second["predicted_peak_bytes/cpu"]) == (5, None, 7)
    assert (first["x"], second["x"]) == (None, "3")


def test_a_model_that_cannot_be_built_again_has_no_prediction_and_a_row_all_the_same(command: Command) -> None:
    Path("once.py").write_text(
        "from lightning_hetero.demos.digits import DigitsCNN\n"
        "made = []\n"
        "class Once(DigitsCNN):\n"
        "    def __init__(self):\n"
        "        if made:\n"
        "            raise KeyError('only once')\n"
        "        made.append(1)\n"
        "        super().__init__()\n"
    )
    assert command("train", "-m", *BRIEF, "model._target_=once.Once").code == 0
    (row,) = rows_of_csv()
    assert (row["status"], row["predicted_step_s"]) == ("ok", "")
    assert float(row["measured_step_s"]) > 0


def test_a_sweep_that_is_interrupted_tells_of_the_jobs_that_ended(command: Command) -> None:
    Path("stops.py").write_text(
        "from lightning_hetero.demos.digits import DigitsCNN\n"
        "class Stops(DigitsCNN):\n"
        "    def __init__(self, lr):\n"
        "        super().__init__(lr=lr)\n"
        "        if lr > 1:\n"
        "            raise KeyboardInterrupt\n"
    )
    with pytest.raises(KeyboardInterrupt):
        command("train", "-m", *BRIEF, "model._target_=stops.Stops", "+model.lr=0.01,2.0,0.02")
    (row,) = rows_of_csv()
    assert (row["job"], row["status"]) == ("0", "ok")
