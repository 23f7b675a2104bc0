"""`strategy="hetero"` with the real Lightning, in both of its namespaces and in every order of imports."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
Ran = dict[str, "subprocess.CompletedProcess[str]"]

REPORT = """
for pl in (lightning.pytorch, pytorch_lightning):
    trainer = pl.Trainer(strategy="hetero", accelerator="cpu", logger=False, enable_checkpointing=False)
    strategy = trainer.strategy
    print(pl.__name__, type(strategy).__name__, isinstance(strategy, pl.strategies.SingleDeviceStrategy))
"""
BOTH_RESOLVE = "lightning.pytorch HeteroStrategy True\npytorch_lightning HeteroStrategy True\n"


HOOK_FIRST = "import lightning_hetero, sys, torch, lightning.pytorch, pytorch_lightning"
LOADED = """
print([name for name in sys.modules if name.startswith(("lightning_hetero.runtime", "lightning_hetero.placement"))])
"""
ACCELERATOR = """
from lightning.pytorch import Trainer

trainer = Trainer(strategy="hetero", accelerator="hetero", devices="cpu", logger=False, enable_checkpointing=False)
print(type(trainer.accelerator).__name__, trainer.strategy.root_device)
"""
VARIABLE = """
import os
from lightning.pytorch import Trainer

os.environ["PL_TRAINER_STRATEGY"] = "hetero"
print(type(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).strategy).__name__)
"""


@pytest.fixture(scope="module")
def hook_first(run_after_imports: Callable[..., Any]) -> Ran:
    """What programs say in which the hook was there first."""
    programs = {"strategy": LOADED + REPORT, "accelerator": ACCELERATOR, "variable": VARIABLE}
    return dict(run_after_imports(HOOK_FIRST, programs))


def test_it_resolves_when_the_hook_was_there_first_and_loads_what_is_large_when_asked(hook_first: Ran) -> None:
    result = hook_first["strategy"]

    assert result.stdout == "[]\n" + BOTH_RESOLVE, result.stderr


def test_it_resolves_when_lightning_was_there_first(run_python: RunPython) -> None:
    result = run_python("-c", "import lightning.pytorch, pytorch_lightning, lightning_hetero" + REPORT)

    assert result.stdout == BOTH_RESOLVE, result.stderr


def test_the_accelerator_resolves_by_name_too(hook_first: Ran) -> None:
    result = hook_first["accelerator"]

    assert result.stdout == "HeteroAccelerator cpu\n", result.stderr


def test_an_environment_variable_of_lightning_chooses_it_without_any_change_of_code(hook_first: Ran) -> None:
    result = hook_first["variable"]

    assert result.stdout == "HeteroStrategy\n", result.stderr


def test_our_classes_may_be_imported_before_lightning(run_python: RunPython) -> None:
    program = """
from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

print("hetero" in AcceleratorRegistry, "hetero" in StrategyRegistry)
"""
    result = run_python("-c", program)

    assert (result.stdout, result.stderr) == ("True True\n", "")


def test_the_off_switch_leaves_lightning_as_it_was(run_python: RunPython) -> None:
    program = "import lightning_hetero, lightning.pytorch as pl; pl.Trainer(strategy='hetero', accelerator='cpu')"
    result = run_python("-c", program, LIGHTNING_HETERO_AUTOREGISTER="0")

    assert result.returncode == 1
    assert "invalid strategy name: `strategy='hetero'`" in result.stderr
