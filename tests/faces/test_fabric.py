"""`Fabric(strategy="hetero")` in both namespaces, by name, by environment, from the command line, and as an object."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

IMPORTS = """
import lightning_hetero
import sys
import torch
from NAMESPACE import Fabric
"""
PROGRAM = """
fabric = Fabric(OPTIONS)
LAUNCH
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
for step in range(3):
    loss = model(torch.ones(4, 4, dtype=torch.float64)).pow(2).mean()
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
with fabric.rank_zero_first():
    total = fabric.all_reduce(loss)
fabric.barrier()
fabric.print(type(fabric.strategy).__module__, fabric.world_size, f"{fabric.broadcast(total).item():.15f}")
"""
DEVICES = {"HETERO_DEVICES": "cpu@speed=1,cpu@speed=1", "HETERO_PLACEMENT": "even", "OMP_NUM_THREADS": "1"}
MODULES = {
    "lightning.fabric": "lightning_hetero.strategy.lightning_fabric",
    "lightning_fabric": "lightning_hetero.strategy.standalone_fabric",
}


def last_line(ran: subprocess.CompletedProcess[str]) -> list[str]:
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1].split()


def program(options: str = "", launch: str = "fabric.launch()") -> str:
    return PROGRAM.replace("OPTIONS", options).replace("LAUNCH", launch)


def imports(namespace: str) -> str:
    return IMPORTS.replace("NAMESPACE", namespace)


@pytest.mark.feature("Fabric: strategy='hetero' by name, in both namespaces")
@pytest.mark.parametrize("namespace", MODULES)
def test_the_name_and_the_environment_mean_the_strategy_of_the_namespace(
    namespace: str, run_forked: RunPython, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(imports("lightning.fabric") + program("accelerator='cpu', devices=1"), {})
    alone = capsys.readouterr().out.splitlines()[-1].split()
    programs = {
        "name": program("strategy='hetero'"),
        "environment": f"import os; os.environ['LT_STRATEGY'] = 'hetero'\n{program()}",
    }
    ran = {}
    for name, text in programs.items():
        (tmp_path / "program.py").write_text(imports(namespace) + text)
        ran[name] = run_forked(str(tmp_path / "program.py"), folder=tmp_path, **DEVICES)
    assert "Plan by policy 'even'" in ran["name"].stdout
    assert last_line(ran["name"]) == [MODULES[namespace], "1", alone[2]]
    assert last_line(ran["environment"]) == last_line(ran["name"])


@pytest.mark.feature("Fabric: fabric run --strategy=hetero")
def test_the_command_line_of_fabric(run_forked: RunPython, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(imports("lightning.fabric") + program(launch=""))
    command = tmp_path / "fabric.py"
    command.write_text("import lightning_hetero; from lightning.fabric.cli import _main; _main()")
    words = ("run", "--strategy=hetero", "--accelerator=cpu", "script.py")
    ran = run_forked(str(command), *words, folder=tmp_path, **DEVICES)
    assert last_line(ran)[:2] == [MODULES["lightning.fabric"], "1"]


@pytest.mark.parametrize("namespace", MODULES)
def test_the_object_is_that_of_the_namespace_in_use(namespace: str, run_python: RunPython) -> None:
    text = "import sys, NAMESPACE, lightning_hetero; print(lightning_hetero.FabricStrategy.__module__)"
    ran = run_python("-c", f"{text.replace('NAMESPACE', namespace)}; print('pytorch_lightning.trainer' in sys.modules)")
    module, has_trainer = ran.stdout.split()
    assert module == MODULES[namespace], ran.stderr
    # Fabric alone does not import the Trainer; the package `lightning` does.
    assert has_trainer == "False" or namespace == "lightning.fabric"


@pytest.mark.feature("Fabric: the Trainer's HeteroStrategy", "refused", "use lightning_hetero.FabricStrategy")
def test_a_strategy_for_the_trainer_is_refused_by_fabric_itself() -> None:
    strategy: Any = HeteroStrategy(placement="even")
    with pytest.raises(ValueError, match=r"invalid strategy name: `strategy=.*instance of `lightning\.fabric"):
        lightning.Fabric(strategy=strategy, accelerator="cpu")
