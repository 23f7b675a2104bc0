"""The names that the package promises: this list, and nothing else."""

from __future__ import annotations

import ast
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_hetero

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

PROMISED = [
    "DeviceSpec",
    "FabricStrategy",
    "HeteroAccelerator",
    "HeteroError",
    "HeteroMonitor",
    "HeteroRuntime",
    "HeteroStrategy",
    "InfeasiblePlanError",
    "Inventory",
    "InventoryError",
    "ModelParallel",
    "ModelParallelConfig",
    "PlacementError",
    "PlacementPolicy",
    "Plan",
    "Stage",
    "UnsupportedError",
    "__version__",
    "discover",
    "export",
    "plan_deployment",
    "register_policy",
    "resolve_devices",
]


def test_the_promise_is_this_list() -> None:
    assert lightning_hetero.__all__ == PROMISED


@pytest.mark.parametrize("name", [name for name in PROMISED if name != "__version__"])
def test_each_name_resolves_and_is_documented(name: str) -> None:
    thing = getattr(lightning_hetero, name)

    assert thing.__name__.rpartition(".")[2] == name  # "export" is a package
    # A dataclass without a docstring has its signature for one.
    assert inspect.getdoc(thing)
    assert not (thing.__doc__ or "").startswith(f"{name}(")


def test_the_version_is_a_release_number() -> None:
    assert [part.isdigit() for part in lightning_hetero.__version__.split(".")] == [True, True, True]


def test_dir_offers_the_names_to_whoever_presses_tab() -> None:
    assert set(PROMISED) <= set(dir(lightning_hetero))


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'lightning_hetero' has no attribute 'HeteroStratgy'$"):
        lightning_hetero.HeteroStratgy  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_lightning_nor_hydra(run_python: RunPython) -> None:
    program = (
        "import sys, lightning_hetero\n"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'hydra', 'omegaconf', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    assert run_python("-c", program).stdout == "[]\n"


def test_type_checkers_see_the_names_where_they_come_from() -> None:
    tree = ast.parse(Path(str(lightning_hetero.__file__)).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}

    assert {name: seen[name] for name in PROMISED if name != "__version__"} == lightning_hetero._HOME_OF
