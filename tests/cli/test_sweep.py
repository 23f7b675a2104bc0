"""`lightning-hetero train -m` runs its jobs in one process; none of them may feel the others."""

from __future__ import annotations

import csv
import gc
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero.demos.digits import DigitsCNN

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

Command = Callable[..., Any]


def numbers(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "metrics.csv").open() as file:
        return [*csv.DictReader(file)]


def live_models() -> int:
    gc.collect()
    return sum(type(thing) is DigitsCNN for thing in gc.get_objects())


def state() -> dict[str, Any]:
    root, lightning = logging.getLogger(), logging.getLogger("lightning")
    return {
        "arguments": list(sys.argv),
        "search path": list(sys.path),
        "environment": dict(os.environ),
        "log handlers": (list(root.handlers), root.level, list(lightning.handlers)),
        "models": live_models(),
    }


def test_a_sweep_over_two_placements_leaves_nothing_behind(command: Command) -> None:
    import lightning.pytorch  # noqa: F401 (its first import adds a handler of its own)
    import sklearn.datasets  # noqa: F401 (its first import sets environment variables)

    before = state()
    outcome = command("train", "-m", *BRIEF, "placement=single,even")
    assert outcome.code == 0
    assert [folder.name for folder in outcome.folders] == ["0", "1"]
    assert state() == before


def test_the_second_job_of_a_sweep_is_bit_equal_to_the_same_job_alone(command: Command) -> None:
    second = command("train", "-m", *BRIEF, "placement=single,even").folders[1]
    (alone,) = command("train", *BRIEF, "placement=even").folders
    assert numbers(second) == numbers(alone)


def test_placements_do_not_change_the_numbers(command: Command) -> None:
    single, even, plain = (
        *command("train", "-m", *BRIEF, "placement=single,even").folders,
        *command("train", *BRIEF, "trainer.strategy=auto").folders,
    )
    assert numbers(single) == numbers(even) == numbers(plain)


def test_a_job_without_a_seed_does_not_inherit_that_of_the_job_before(command: Command) -> None:
    random.seed(0)
    folders = command("train", "-m", *BRIEF, "seed=1,null,null").folders
    assert numbers(folders[1]) != numbers(folders[0])
    assert numbers(folders[1]) != numbers(folders[2])


def test_a_sweeper_is_told_the_best_value_of_the_chosen_metric(command: Command) -> None:
    Path("told.py").write_text(
        "from hydra.experimental.callback import Callback\n"
        "class Told(Callback):\n"
        "    def on_job_end(self, config, job_return, **kwargs):\n"
        "        print('told', job_return.return_value)\n"
    )
    told = "+hydra.callbacks.told={_target_: told.Told}"
    words = [word for word in BRIEF if "max_epochs" not in word] + ["trainer.max_epochs=2", told]
    outcome = command("train", *words)
    validated = [float(row["val/loss"]) for row in numbers(outcome.folders[0]) if row.get("val/loss")]
    (value,) = [float(line.split()[1]) for line in outcome.out.splitlines() if line.startswith("told ")]
    assert value == pytest.approx(min(validated))
    elsewhere = "hydra.run.dir=another"  # the usual name of the folder is the second in which the job began
    assert "told None" in command("train", *words, "optimized_metric=null", elsewhere).out
