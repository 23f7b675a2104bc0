"""`lightning-hetero train` trains, tests, and leaves everything in the folder of the run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval.*"),
]
QUIET = ("trainer.max_epochs=1", "+trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false")
BRIEF = (*QUIET, "+trainer.limit_train_batches=4", "+trainer.limit_val_batches=2", "+trainer.limit_test_batches=2")
SMALL = ("+data.max_bytes=400000", "trainer.val_check_interval=2")

Command = Callable[..., Any]


def plan(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "logs" / "hetero_plan.json").read_text()))


def metrics(out: str) -> dict[str, float]:
    """The lines such as `test/acc 0.9833`."""
    return {name: float(value) for name, value in re.findall(r"^(test/\w+) (\d+\.\d{4})$", out, re.MULTILINE)}


@pytest.mark.parametrize(
    "extra", [(), ("devices=emulated",), ("trainer.strategy=auto",)], ids=lambda e: "".join(e) or "-"
)
@pytest.mark.parametrize("experiment", ["digits", "stdlib_lm"])
def test_every_experiment_runs(experiment: str, extra: tuple[str, ...], command: Command) -> None:
    small = SMALL if experiment == "stdlib_lm" else ()
    outcome = command("train", f"experiment={experiment}", *extra, *BRIEF, *small)
    assert outcome.code == 0
    assert metrics(outcome.out).keys() >= {"test/acc", "test/loss"}


def test_the_digits_are_spread_over_all_emulated_devices(command: Command) -> None:
    (folder,) = command("train", "experiment=digits", "devices=emulated", *BRIEF).folders
    assert plan(folder)["policy"] == "even"
    assert [stage["device"] for stage in plan(folder)["stages"]] == ["emulated:0", "emulated:1", "emulated:2"]


def test_the_command_line_overrides_the_placement_of_an_experiment(command: Command) -> None:
    (folder,) = command("train", "experiment=digits", "devices=emulated", "placement=auto", *BRIEF).folders
    assert plan(folder)["policy"] == "auto"


def test_a_device_map_from_the_command_line_is_obeyed(command: Command) -> None:
    device_map = "placement.device_map={features: emulated:2, *: emulated:1}"
    (folder,) = command("train", "devices=emulated", "placement=manual", device_map, *BRIEF).folders
    assert [stage["device"] for stage in plan(folder)["stages"]] == ["emulated:2", "emulated:1"]


def test_the_run_leaves_weights_logs_and_configuration_in_its_folder(command: Command) -> None:
    outcome = command("train", "experiment=digits", "devices=emulated", *QUIET)
    (folder,) = outcome.folders
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", folder.relative_to(Path.cwd()).as_posix())
    made = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert made >= {".hydra/config.yaml", "train.log", "logs/metrics.csv", "logs/hetero_plan.json"}
    assert len([*folder.glob("checkpoints/*.ckpt")]) == 1
    assert {path.name for path in Path.cwd().iterdir()} == {"outputs"}


def test_the_test_is_run_with_the_weights_that_did_best_in_validation(command: Command) -> None:
    Path("spoil.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Spoil(pl.Callback):\n"
        "    def on_fit_end(self, trainer, pl_module):\n"
        "        for parameter in pl_module.parameters():\n"
        "            parameter.data.zero_()\n"
    )
    keeper = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/loss}"
    callbacks = f"trainer.callbacks=[{keeper},{{_target_: spoil.Spoil}}]"
    outcome = command("train", "experiment=digits", *QUIET, callbacks)
    assert metrics(outcome.out)["test/acc"] > 0.5  # with the last weights, which are zero, it is 0.1


def test_each_line_of_log_is_printed_once_and_kept(command: Command) -> None:
    outcome = command("train", "experiment=digits", "devices=emulated", *BRIEF)
    stopped = "`Trainer.fit` stopped: `max_epochs=1` reached."
    assert (outcome.out + outcome.err).count(stopped) == 1


def test_the_folder_of_the_run_and_any_option_of_the_trainer_can_be_chosen(command: Command) -> None:
    outcome = command("train", "hydra.run.dir=here", "+trainer.fast_dev_run=2", "trainer.logger=false", *QUIET)
    assert outcome.code == 0
    assert [folder.name for folder in outcome.folders] == ["here"]


def test_a_model_of_ones_own_is_found_in_the_current_folder(command: Command) -> None:
    Path("mine.py").write_text(
        "from lightning_hetero.demos.digits import DigitsCNN\n"
        "class Mine(DigitsCNN):\n"
        "    def on_test_end(self):\n"
        "        print('mine was tested')\n"
    )
    assert "mine was tested" in command("train", "model._target_=mine.Mine", *BRIEF).out


def test_the_split_model_reads_digits_as_well_as_one_on_one_device(command: Command) -> None:
    quiet = QUIET[1:]
    split = metrics(command("train", "experiment=digits", "devices=emulated", *quiet).out)
    plain = metrics(command("train", "experiment=digits", "devices=emulated", "trainer.strategy=auto", *quiet).out)
    assert split["test/acc"] >= 0.96
    assert abs(split["test/acc"] - plain["test/acc"]) <= 0.01


@pytest.mark.slow
def test_the_language_model_learns_with_the_defaults_of_its_experiment(command: Command) -> None:
    few = ("+trainer.limit_val_batches=5", "+trainer.limit_test_batches=20")  # of training, nothing is left out
    outcome = command("train", "experiment=stdlib_lm", *QUIET[1:], *few)
    assert metrics(outcome.out)["test/bits_per_byte"] < 3.6
