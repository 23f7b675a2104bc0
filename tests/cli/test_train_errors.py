"""What `lightning-hetero train` says when it cannot do what was asked: no traceback, and a way on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from lightning_hetero import InventoryError
from lightning_hetero.cli import main
from lightning_hetero.cli.explain import explain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
DRY = ("+trainer.fast_dev_run=true", "trainer.logger=false", "+trainer.enable_model_summary=false")

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["placement.polcy=even"], ["Key 'polcy' not in 'PlacementConf'", "Did you mean 'placement.policy'?"]),
        (["devices.memry={}"], ["Key 'memry' not in 'DevicesConf'", "Did you mean 'devices.memory'?"]),
        (["placement=evn"], ["Could not find 'placement/evn'", "memory_first", "Did you mean 'even'?"]),
        (["placment=even"], ["Could not override 'placment'", "Did you mean 'placement'?"]),
        (["experimnt=digits"], ["Could not override 'experimnt'", "Did you mean 'experiment'?"]),
        (["trainer.max_epoch=3"], ["+trainer.max_epoch=3", "Did you mean 'trainer.max_epochs'?"]),
        (["trainer.strategy.devces=cpu"], ["Did you mean 'trainer.strategy.devices'?"]),
        (["model=tiny_gpt", "sead=3", "placement=manual"], ["Did you mean 'seed'?"]),
        (["zzz=3"], ["Could not override 'zzz'"]),
        (["placement.plan=[a]"], ["Cannot convert 'list' to string"]),
        (["model=null"], ["model=null is no file of the group 'model'; leave it out to keep the default"]),
        (["experiment=null"], ["experiment=null is no file of the group 'experiment'"]),
        (["hydra.run.dir=/dev/null/x"], ["the folder of the run cannot be made", "/dev/null/x", "hydra.run.dir=..."]),
        (["seed=["], ["no viable alternative at input '['"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_in_the_configuration_is_answered_before_anything_runs(
    words: list[str], parts: list[str], command: Command
) -> None:
    outcome = command("train", *words)
    assert (outcome.code, outcome.out, outcome.folders) == (1, "", [])
    assert outcome.err.startswith("lightning-hetero train: ")
    assert [part for part in parts if part not in outcome.err] == []
    assert ("Did you mean" in outcome.err) == any("Did you mean" in part for part in parts)
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["+trainer.max_epocs=2"], ["unexpected keyword argument 'max_epocs'", "Did you mean 'max_epochs'?"]),
        (["+model.widht=8"], ["unexpected keyword argument 'widht'", "Did you mean 'width'?"]),
        (["model._target_=no.such.Model"], ["Error locating target 'no.such.Model'"]),
        (["trainer.max_epochs=${oops}"], ["Interpolation key 'oops' not found"]),
        (["devices.request=cuda:99"], ["device 'cuda:99'", "Available: "]),
        (["placement.policy=evn"], ["unknown placement policy 'evn'. Did you mean 'even'?"]),
        (["+devices.memry={}"], ["nothing reads 'devices.memry'", "Did you mean 'devices.memory'?"]),
        (["devices.memory=3"], ["devices.memory=3 is not a mapping"]),
        (["placement=manual"], ["placement 'manual' needs a device map"]),
        (["placement=manual", "placement.device_map={feature: cpu}", *DRY], ["Did you mean 'features'"]),
        (["devices.request='cpu@mem=1KiB'", *DRY], ["which has 1.00 KiB", "Try: "]),
        (["placement.plan=none.json", *DRY], ["none.json", "lightning-hetero plan ... save=FILE"]),
        (["~data"], ["Key 'data' is not in struct", "~data takes it away; leave that out"]),
        (["~schedule"], ["Interpolation key 'schedule.", "~schedule takes it away; leave that out"]),
        (["seed=abc"], ["seed='abc' must be a whole number from 0 to 4294967295, or null"]),
        (["seed=-1"], ["seed=-1 must be a whole number from 0"]),
        (["trainer.max_epochs=abc"], ["trainer.max_epochs='abc' must be a whole number or null"]),
        (["trainer.max_epochs=1.5"], ["trainer.max_epochs=1.5 must be a whole number or null"]),
        (["+model.lr=fast"], ["model.lr='fast' must be a number"]),
        (["optimized_metric=3", *DRY], ["optimized_metric=3 is not among the metrics", "val/loss"]),
        (["optimized_metric=val/los", *DRY], ["optimized_metric='val/los'", "Did you mean 'val/loss'?"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_job_that_cannot_run_ends_with_a_message(words: list[str], parts: list[str], command: Command) -> None:
    outcome = command("train", *words)
    assert outcome.code == 1
    assert "\nlightning-hetero train: " in f"\n{outcome.err}"
    assert [part for part in parts if part not in outcome.err] == []
    assert "Traceback" not in outcome.err


def test_with_full_errors_the_traceback_is_python_s(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(HydraException, match="placment"):
        command("train", "placment=even")
    with pytest.raises(HydraException) as caught:
        command("train", "devices.request=cuda:99")
    assert isinstance(caught.value.__cause__, InventoryError)
    with pytest.raises(OmegaConfBaseException):
        command("train", "trainer=default", "seed=${oops}")


def test_a_defect_of_the_user_s_own_code_keeps_its_traceback(command: Command) -> None:
    Path("broken.py").write_text(
        "from lightning_hetero.demos.digits import DigitsCNN\n"
        "class Broken(DigitsCNN):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        raise ZeroDivisionError('mine')\n"
    )
    with pytest.raises(ZeroDivisionError, match="mine"):
        command("train", "model._target_=broken.Broken", *DRY)


def test_the_process_ends_with_code_one_and_no_traceback(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    ran = run_python("-m", "lightning_hetero.cli", "train", "placment=even", HYDRA_FULL_ERROR="0")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "Did you mean 'placement'?" in ran.stderr


@pytest.mark.parametrize("flag", ["--help", "--hydra-help"])
def test_help_is_hydra_s_own_and_no_failure(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", flag])
    assert leaving.value.code == 0
    assert "lightning-hetero train" in capsys.readouterr().out


def test_a_flag_that_hydra_does_not_know_is_refused_with_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--multrun"])
    assert leaving.value.code == 2
    assert "unrecognized arguments: --multrun" in capsys.readouterr().err


def test_showing_the_configuration_runs_nothing(command: Command) -> None:
    outcome = command("train", "--cfg", "job", "experiment=digits", "placement=auto")
    assert (outcome.code, outcome.err, outcome.folders) == (0, "", [])
    assert "policy: auto" in outcome.out


@pytest.mark.parametrize("name", ["hydra/sweeper/optuna", "hydra/launcher/joblib"])
def test_a_plugin_that_is_not_installed_is_named(name: str) -> None:
    missing = MissingConfigException(f"Could not find '{name}'", name, ["basic"])
    assert explain(missing, [], "train") == (
        f"Could not find '{name}'\nIt is part of a plugin: pip install 'lightning-hetero[sweeps]'"
    )
