"""`lightning-hetero run` does to a program what `python` does, but for the strategy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero.cli import main

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
Command = Callable[..., Any]

TRAINS = """
import torch
from lightning.pytorch import LightningModule, Trainer

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def train(**options):
    torch.manual_seed(0)
    model, rows = Net(), torch.utils.data.TensorDataset(torch.ones(8, 4))
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=4))
    return type(trainer.strategy).__name__, round(float(model.net[0].weight.sum()), 4)

print()  # not on the line of a plan
print(*train(), *train(strategy="auto"))
"""
TWO_DEVICES = {"HETERO_DEVICES": "cpu@speed=1,cpu@speed=0.5", "HETERO_PLACEMENT": "even", "OMP_NUM_THREADS": "1"}
ENDINGS = {
    "returns": "print('done')",
    "leaves with a number": "import sys; sys.exit(7)",
    "leaves with a text": "raise SystemExit('because')",
    "raises": "def inner():\n    raise ValueError('oops')\n\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    inner()",
    "does not parse": "x = = 1",
    "has a hook": "import sys\nsys.excepthook = lambda *found: print('hook', found[0].__name__)\nraise KeyError(1)",
    "is not found by import": "import no_such_module_at_all",
}


def ours(run_python: RunPython, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "lightning_hetero.cli", "run", *words, **environment)


def last_line(ran: subprocess.CompletedProcess[str]) -> list[str]:
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1].split()


def test_a_plain_script_runs_over_several_devices_and_its_own_choice_wins(
    tmp_path: Path, run_python: RunPython
) -> None:
    Path(tmp_path, "train.py").write_text(TRAINS)
    ran = ours(run_python, "train.py", **TWO_DEVICES)
    assert "Plan by policy 'even'" in ran.stdout
    assert "emulated:1" in ran.stdout
    unnamed, number, named, same = last_line(ran)
    assert (unnamed, named, number) == ("HeteroStrategy", "SingleDeviceStrategy", same)
    assert last_line(run_python("train.py")) == [named, number, named, number]


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_script_ends_as_under_python(ending: str, tmp_path: Path, run_python: RunPython) -> None:
    Path(tmp_path, "script.py").write_text(ending)
    mine, pythons = ours(run_python, "script.py"), run_python("script.py")
    assert (mine.returncode, mine.stdout, mine.stderr) == (pythons.returncode, pythons.stdout, pythons.stderr)


def test_a_script_sees_its_own_arguments_and_folder(tmp_path: Path, run_python: RunPython) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "beside.py").write_text("word = 'imported'")
    (folder / "script.py").write_text(
        "import sys, os, beside, pickle\n"
        "class Mine: pass\n"
        "print(sys.argv[1:], os.path.basename(sys.argv[0]), beside.word, __name__, os.path.isabs(__file__))\n"
        "print(type(pickle.loads(pickle.dumps(Mine()))) is Mine, sys.path[0], os.environ['PL_TRAINER_STRATEGY'])\n"
    )
    words = ("-m", "--lr", "0.1", "--help", "--", "-x")
    ran = ours(run_python, "project/script.py", *words)
    assert ran.stdout.splitlines() == [
        f"{[*words]} script.py imported __main__ True",
        f"True {folder} hetero",
    ]
    named = ours(run_python, "project/script.py", PL_TRAINER_STRATEGY="ddp")
    assert named.stdout.split()[-1] == "ddp"


def test_a_module_is_found_from_the_current_folder(tmp_path: Path, run_python: RunPython) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text("import sys\nprint(__name__, __package__, sys.argv)\n")
    (package / "fails.py").write_text("raise RuntimeError('in a module')")
    words = ("-m", "package.train", "--lr", "1")
    assert ours(run_python, *words).stdout == run_python(*words).stdout
    failed = ours(run_python, "-m", "package.fails")
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "Traceback (most recent call last):",
        f'  File "{package / "fails.py"}", line 1, in <module>',
        "    raise RuntimeError('in a module')",
        "RuntimeError: in a module",
    ]


def test_control_c_is_told_as_a_shell_tells_it(tmp_path: Path, run_python: RunPython) -> None:
    Path(tmp_path, "script.py").write_text("raise KeyboardInterrupt")
    ran = ours(run_python, "script.py")
    assert ran.returncode == 130
    assert ran.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_nothing_of_a_run_stays(command: Command, tmp_path: Path) -> None:
    Path("script.py").write_text("import sys; sys.path.append('mine'); print('ran')")
    before = dict(os.environ), list(sys.argv), list(sys.path), sys.modules["__main__"]
    assert command("run", "script.py", "--flag").out == "ran\n"
    assert (dict(os.environ), list(sys.argv), list(sys.path), sys.modules["__main__"]) == before
    Path("script.py").write_text("raise ValueError")
    assert command("run", "script.py").code == 1
    assert (dict(os.environ), list(sys.argv), list(sys.path), sys.modules["__main__"]) == before


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["trian.py"], 2, ["can't open file", "trian.py", "Did you mean 'train.py'?"]),
        (["nothing"], 2, ["can't open file", "lightning-hetero run -m MODULE"]),
        (["-m", "no_such_module"], 1, ["no module named 'no_such_module'"]),
        (["-m", "no_such.module"], 1, ["no module named 'no_such.module' can be run: ModuleNotFoundError"]),
        (["-m", "train.py"], 1, ["'train.py' is a file, which is run without -m: `lightning-hetero run train.py`"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_not_there_is_told(words: list[str], code: int, parts: list[str], command: Command) -> None:
    Path("train.py").write_text("")
    outcome = command("run", *words)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("lightning-hetero run: ")
    assert [part for part in parts if part not in outcome.err] == []


@pytest.mark.parametrize("words", [[], ["-m"], ["--strategy", "x"]], ids=" ".join)
def test_a_line_without_a_program_is_answered_with_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["run", *words])
    assert leaving.value.code == 2
    assert "usage: lightning-hetero run SCRIPT" in capsys.readouterr().err


def test_a_switched_off_registration_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HETERO_AUTOREGISTER", "0")
    outcome = command("run", "script.py")
    assert outcome.code == 2
    assert "LIGHTNING_HETERO_AUTOREGISTER=0 hides the strategy 'hetero' from Lightning; unset it" in outcome.err


def test_a_folder_without_a_main_program_is_refused(command: Command) -> None:
    Path("folder").mkdir()
    refused = command("run", "folder")

    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "lightning-hetero run: 'folder' is a folder without a __main__.py; name the file to run\n"


def test_a_folder_with_a_main_program_runs_as_under_python(command: Command) -> None:
    Path("folder").mkdir()
    Path("folder", "__main__.py").write_text("print(__name__)")
    ran = command("run", "folder")

    assert (ran.code, ran.out) == (0, "__main__\n")
