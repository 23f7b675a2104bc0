"""Sweeps by other people's plugins: Optuna chooses the jobs, joblib runs them side by side."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra 'sweeps' is not installed")
pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra 'sweeps' is not installed")

pytestmark = [
    pytest.mark.usefixtures("devices_measured_once"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval.*"),
    # Optuna 2.10, which the sweeper asks for, is older than SQLAlchemy 2 and Python 3.12.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:optuna"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
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

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def results(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("multirun/*/*/sweep.csv")
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def best(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("multirun/*/*/optimization_results.yaml")
    return dict(yaml.safe_load(path.read_text()))


@pytest.mark.slow
def test_optuna_looks_for_the_fastest_plan_in_eight_trials(command: Command, tmp_path: Path) -> None:
    outcome = command("train", "-m", "hydra/sweeper=plans", *BRIEF, "optimized_metric=hetero/step_s")
    rows = results(tmp_path)
    assert [int(row["job"]) for row in rows] == [*range(8)]
    assert {row["status"] for row in rows} == {"ok"}
    assert outcome.code == 0
    assert len({row["schedule"] for row in rows}) > 1
    assert len({row["placement"] for row in rows}) > 1
    assert [row["metric"] for row in rows] == [row["measured_step_s"] for row in rows]
    fastest = min(rows, key=lambda row: float(row["metric"]))
    found = best(tmp_path)
    assert found["best_value"] == float(fastest["metric"])
    assert found["best_params"] == {
        "placement": fastest["placement"],
        "schedule": fastest["schedule"],
        "schedule.micro_batches": int(fastest["schedule.micro_batches"]),
    }


def test_a_trial_that_fails_is_a_row_and_the_search_goes_on(command: Command, tmp_path: Path) -> None:
    search = (
        "placement=choice(single,manual)",
        "schedule=whole",
        "schedule.micro_batches=1",
        "hydra.sweeper.n_trials=5",
    )
    outcome = command("train", "-m", "hydra/sweeper=plans", *BRIEF, *search)
    rows = results(tmp_path)
    assert len(rows) == 5
    assert {(row["placement"], row["status"]) for row in rows} == {("single", "ok"), ("manual", "failed")}
    assert best(tmp_path)["best_params"] == {"placement": "single"}
    assert outcome.code == 1


@pytest.mark.slow
def test_jobs_side_by_side_leave_the_same_rows(
    command: Command, run_python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    words = ("train", "-m", *BRIEF, "placement=single,manual,even")
    cache = str(tmp_path / "cache")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    ran = run_python("-m", "lightning_hetero.cli", *words, *joblib, XDG_CACHE_HOME=cache)  # workers outlive a sweep
    assert ran.returncode == 1, ran.stderr
    apart = results(tmp_path)
    same = ("job", "placement", "status", "metric", "plan_hash", "reason")
    Path("other").mkdir()
    assert command(*words, "hydra.sweep.dir=other/multirun/a/b").code == 1
    alone = results(tmp_path / "other")
    assert [[row[key] for key in same] for row in apart] == [[row[key] for key in same] for row in alone]
    assert all(float(row["measured_step_s"]) > 0 for row in apart if row["status"] == "ok")
