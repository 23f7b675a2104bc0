"""Somebody else's Hydra application, which never heard of us, in the environment that holds our plugin."""

from __future__ import annotations

import importlib
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_hetero

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

APP = """
import hydra
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    print("ran with", sorted(cfg))

main()
"""
TRAINER = {"_target_": "lightning.pytorch.Trainer", "max_epochs": 10, "accelerator": "cpu", "devices": 1}


@pytest.fixture
def app(run_python: RunPython, tmp_path: Path) -> RunPython:
    """Runs the application with the given command line; it is laid out as lightning-hydra-template is."""
    (tmp_path / "conf" / "trainer").mkdir(parents=True)
    (tmp_path / "conf" / "train.yaml").write_text("defaults:\n  - trainer: default\n  - _self_\nseed: 1\n")
    (tmp_path / "conf" / "trainer" / "default.yaml").write_text(yaml.safe_dump(TRAINER))
    (tmp_path / "app.py").write_text(APP)
    return lambda *arguments, **environment: run_python("app.py", *arguments, **environment)


def job(app: RunPython, *overrides: str) -> dict[str, Any]:
    run = app(*overrides, "--cfg", "job")
    assert run.returncode == 0, run.stderr
    config: dict[str, Any] = yaml.safe_load(run.stdout)
    return config


def test_our_configurations_stand_last_in_its_search_path(app: RunPython, pytestconfig: pytest.Config) -> None:
    lines = [line for line in app("--info", "searchpath").stdout.splitlines() if line.startswith("| ")]
    providers = [line.split("|")[1].strip() for line in lines]

    assert providers == ["Provider", "hydra", "main", "lightning-hetero", "schema"]
    assert f"file://{pytestconfig.rootpath / 'hydra_plugins'}" in lines[3]


def test_its_own_configuration_is_what_it_was(app: RunPython) -> None:
    assert job(app) == {"trainer": TRAINER, "seed": 1}
    assert app().stdout == "ran with ['seed', 'trainer']\n"


@pytest.mark.parametrize("placement", ["auto", "even", "memory_first", "single"])
def test_one_word_adds_the_strategy_and_keeps_the_other_settings_of_the_trainer(app: RunPython, placement: str) -> None:
    trainer = job(app, f"+hetero={placement}")["trainer"]
    strategy = trainer.pop("strategy")

    assert trainer == {**TRAINER, "accelerator": "auto", "devices": "auto"}
    assert strategy["_target_"] == "lightning_hetero.HeteroStrategy"
    assert strategy["placement"] == placement


def test_what_the_command_line_says_comes_last(app: RunPython) -> None:
    trainer = job(app, "+hetero=auto", "trainer.strategy.devices=[cuda:0,cpu]", "trainer.accelerator=cpu")["trainer"]

    assert trainer["strategy"]["devices"] == ["cuda:0", "cpu"]
    assert trainer["accelerator"] == "cpu"


def test_a_policy_of_ones_own_can_stand_for_the_name_of_one(app: RunPython) -> None:
    trainer = job(app, "+hetero=auto", "trainer.strategy.placement={net: 'cuda:0', head: cpu}")["trainer"]

    assert trainer["strategy"]["placement"] == {"net": "cuda:0", "head": "cpu"}


def test_the_group_fits_a_trainer_of_another_name(app: RunPython) -> None:
    config = job(app, "+hetero@pl_trainer=even")

    assert config["pl_trainer"]["strategy"]["_target_"] == "lightning_hetero.HeteroStrategy"
    assert config["pl_trainer"]["strategy"]["placement"] == "even"
    assert config["trainer"] == TRAINER


def test_a_misspelt_argument_is_refused(app: RunPython) -> None:
    run = app("+hetero=auto", "trainer.strategy.placment=even")

    assert run.returncode == 1
    assert "Key 'placment' not in 'HeteroConf'" in run.stderr


def test_a_sweep_goes_over_all_of_the_group(app: RunPython) -> None:
    run = app("-m", "+hetero=glob(*)", "hydra.sweep.dir=sweep")

    assert run.stdout.count("ran with ['seed', 'trainer']") == 4, run.stderr
    assert run.stderr == ""


def test_a_sweep_over_its_own_group_meets_none_of_our_files(app: RunPython, tmp_path: Path) -> None:
    for group in ("experiment", "model", "placement"):
        (tmp_path / "conf" / group).mkdir()
        (tmp_path / "conf" / group / "mine.yaml").write_text("x: 1\n")
    run = app("-m", "+experiment=glob(*)", "+model=glob(*)", "+placement=glob(*)", "hydra.sweep.dir=sweep")

    assert run.stdout.count("ran with") == 1, run.stderr


def test_its_help_names_no_group_of_ours_but_hetero(app: RunPython) -> None:
    groups = app("--help").stdout.partition("== Configuration groups ==")[2].partition("== Config ==")[0]

    assert [line.partition(":")[0] for line in groups.splitlines() if ":" in line] == [
        "hetero",
        "lightning_hetero_schema",
        "trainer",
    ]


def test_the_schema_has_the_arguments_and_the_defaults_of_the_strategy() -> None:
    plugin = importlib.import_module("hydra_plugins.lightning_hetero_searchpath")
    schema = {name: value for name, value in vars(plugin.HeteroConf()).items() if not name.startswith("_")}
    parameters = inspect.signature(lightning_hetero.HeteroStrategy).parameters

    assert schema == {name: parameter.default for name, parameter in parameters.items()}


def test_the_strategy_can_be_built_from_the_configuration(run_python: RunPython) -> None:
    program = """
from hydra import compose, initialize
from hydra.utils import instantiate

with initialize(version_base="1.3", config_path=None):
    config = compose(overrides=["+hetero=even", "+trainer._target_=lightning.pytorch.Trainer", "+trainer.logger=false"])
trainer = instantiate(config.trainer)
print(type(trainer.strategy).__name__, config.trainer.strategy.placement)
"""
    run = run_python("-c", program)

    assert run.stdout == "HeteroStrategy even\n", run.stderr


def test_the_name_alone_resolves_in_a_hydra_application_even_without_entry_points(run_python: RunPython) -> None:
    program = """
from hydra import compose, initialize
from hydra.utils import instantiate

with initialize(version_base="1.3", config_path=None):
    config = compose(overrides=["+_target_=lightning.pytorch.Trainer", "+strategy=hetero", "+logger=false"])
print(type(instantiate(config).strategy).__name__)
"""
    run = run_python("-c", program, TORCH_DEVICE_BACKEND_AUTOLOAD="0")

    assert run.stdout == "HeteroStrategy\n", run.stderr


def test_the_application_runs_even_where_our_package_is_damaged(app: RunPython, tmp_path: Path) -> None:
    # Hydra finds our plugin on the path, but `import lightning_hetero` fails.
    (tmp_path / "lightning_hetero").mkdir()
    (tmp_path / "lightning_hetero" / "__init__.py").write_text("raise RuntimeError('half of it is missing')\n")
    run = app()

    assert run.stdout == "ran with ['seed', 'trainer']\n"
    assert run.stderr == "+hetero=... and strategy=hetero may fail in this application: half of it is missing\n"
