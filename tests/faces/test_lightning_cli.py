"""LightningCLI: the strategy by name, by class, and in a configuration file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lightning_hetero.testing.accelerator import EmulatedAccelerator

CLASSES = {
    "lightning.pytorch": "lightning_hetero.strategy.lightning_pytorch.HeteroStrategy",
    "pytorch_lightning": "lightning_hetero.strategy.pytorch_lightning.HeteroStrategy",
}
Fit = Callable[..., Any]


@pytest.fixture
def fit(namespace: str, project: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Runs `cli.py fit` with the given words; gives the Trainer. The run must have the losses of one device."""
    module = project(namespace)
    cli = importlib.import_module(f"{namespace}.cli")

    def run(*words: str) -> Any:
        defaults = {
            "default_root_dir": str(tmp_path),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls an old name of theirs
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--trainer.max_epochs=2", *words])
        ran = cli.LightningCLI(
            module.Net, trainer_defaults=defaults, save_config_callback=None, seed_everything_default=1
        )
        assert ran.model.losses == module.train(accelerator="cpu")
        return ran.trainer

    return run


@pytest.mark.feature("programs: LightningCLI")
def test_strategy_and_accelerator_by_name(fit: Fit, accelerator: EmulatedAccelerator) -> None:
    devices = f"cpu,{accelerator.devices[1]}"
    trainer = fit("--trainer.strategy=hetero", "--trainer.accelerator=hetero", f"--trainer.devices={devices}")
    assert trainer.strategy.inventory.names == ("cpu", accelerator.devices[1])
    assert type(trainer.accelerator).__name__ == "HeteroAccelerator"


def test_strategy_by_class_with_arguments_of_its_own(
    fit: Fit, namespace: str, accelerator: EmulatedAccelerator
) -> None:
    trainer = fit(
        f"--trainer.strategy={CLASSES[namespace]}",
        f"--trainer.strategy.devices=[cpu, {accelerator.devices[0]}]",
        "--trainer.strategy.placement={net.0: cpu, net.1: cpu, '': auto}",
        "--trainer.strategy.memory={cpu: 1GiB}",
        "--trainer.strategy.verbose=false",
    )
    assert trainer.strategy.plan.policy == "manual"
    assert trainer.strategy.inventory["cpu"].memory_bytes == 1 << 30


@pytest.mark.feature("programs: LightningCLI")
def test_strategy_in_a_file(fit: Fit, namespace: str, accelerator: EmulatedAccelerator, tmp_path: Path) -> None:
    devices = {accelerator.devices[0]: "1GiB", "cpu": None}
    strategy = {"class_path": CLASSES[namespace], "init_args": {"devices": devices, "placement": "even"}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}, sort_keys=False))
    trainer = fit(f"--config={file}")
    assert [stage.device for stage in trainer.strategy.plan.stages] == [*devices]


@pytest.mark.feature("guards: unknown arguments of HeteroStrategy", "refused")
@pytest.mark.parametrize("namespace", ["lightning.pytorch"], indirect=True)
def test_a_misspelt_argument_is_refused_by_name(fit: Fit, namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fit(f"--trainer.strategy={CLASSES[namespace]}", "--trainer.strategy.placment=even")
    assert "placment" in capsys.readouterr().err


@pytest.mark.parametrize("namespace", ["lightning.pytorch"], indirect=True)
def test_the_public_name_is_a_class_path_too(fit: Fit) -> None:
    trainer = fit("--trainer.strategy=lightning_hetero.HeteroStrategy", "--trainer.strategy.devices=cpu")
    assert trainer.strategy.inventory.names == ("cpu",)
