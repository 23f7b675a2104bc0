"""Programs of users, run in a process of their own: no line of them names this package."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
Project = Callable[[str], ModuleType]

# The CPU plays both devices, since these programs do not install an accelerator.
TWO_DEVICES = {"HETERO_DEVICES": "cpu@speed=1,cpu@speed=0.5", "HETERO_PLACEMENT": "even", "OMP_NUM_THREADS": "1"}


def spread_runs(ran: subprocess.CompletedProcess[str]) -> int:
    """How many runs printed a plan over both devices."""
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("│ 1     │ emulated:1 │ net.3") == ran.stdout.count("Plan by policy 'even'")
    return ran.stdout.count("Plan by policy 'even'")


@pytest.mark.feature("programs: PL_TRAINER_STRATEGY=hetero, without a change of code")
def test_an_environment_variable_spreads_a_script_as_it_stands(
    namespace: str, project: Project, run_forked: RunPython, tmp_path: Path
) -> None:
    module = project(namespace)
    assert module.__file__ is not None
    ran = run_forked(module.__file__, folder=tmp_path, PL_TRAINER_STRATEGY="hetero", **TWO_DEVICES)
    assert spread_runs(ran) == 1
    assert json.loads(ran.stdout.splitlines()[-1]) == module.train(accelerator="cpu")


@pytest.mark.parametrize(
    "order", [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
)
def test_one_word_spreads_runs_of_both_namespaces_in_one_process(
    order: tuple[str, str], project: Project, run_forked: RunPython, tmp_path: Path
) -> None:
    names = [project(namespace).__name__ for namespace in order]
    program = tmp_path / "both.py"
    program.write_text(f"""
import json
import {names[0]} as one
import {names[1]} as other

def results(**options):
    return [one.train(**options), other.train(**options)]

print()  # not on the line of a plan
print(json.dumps([results(strategy="hetero"), results(accelerator="cpu")]))
""")
    ran = run_forked(str(program), folder=tmp_path, **TWO_DEVICES)
    assert spread_runs(ran) == 2
    spread, alone = json.loads(ran.stdout.splitlines()[-1])
    assert spread == alone
    assert len(spread[0]) == 10
