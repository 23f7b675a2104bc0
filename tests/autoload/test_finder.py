"""The import hook by itself, on a stand-in for Lightning: a tree of empty modules with Lightning's names."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

CONNECTOR = "pytorch_lightning.trainer.connectors.accelerator_connector"
FAILED = 'Trainer(strategy="hetero") will not be found by pytorch_lightning, because its registration failed: '
PRELUDE = f"""
import importlib, importlib.util, inspect, sys
CONNECTOR = {CONNECTOR!r}

def ours():
    return [finder for finder in sys.meta_path if type(finder).__name__ == "ConnectorFinder"]
"""


@pytest.fixture
def run(run_python: RunPython, tmp_path: Path) -> Callable[..., str]:
    """Runs a program beside the stand-in, which has no registries; gives its output, errors included."""
    for name in ("lightning/pytorch", "pytorch_lightning"):
        folder = tmp_path / name / "trainer" / "connectors"
        folder.mkdir(parents=True)
        fabric = tmp_path / {"lightning/pytorch": "lightning/fabric"}.get(name, "lightning_fabric")
        fabric.mkdir()
        (fabric / "__init__.py").touch()
        (fabric / "connector.py").touch()
        for package in (folder, *folder.parents):
            if package == tmp_path:
                break
            (package / "__init__.py").touch()
        (folder / "accelerator_connector.py").write_text("ANSWER = 42\n")

    def run_program(program: str, *options: str, **environment: str) -> str:
        result = run_python(*options, "-c", PRELUDE + program, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    return run_program


def test_the_hook_waits_and_registers_after_the_module_was_executed(run: Callable[..., str]) -> None:
    output = run("import lightning_hetero; print('waiting'); importlib.import_module(CONNECTOR); print('go on')")

    # The stand-in has no registries: the complaint shows that registration was tried, and when.
    assert FAILED in output
    assert output.count("registration failed") == 1
    assert "go on" in output


def test_a_lightning_that_is_loaded_already_is_registered_at_once(run: Callable[..., str]) -> None:
    output = run("importlib.import_module(CONNECTOR); import lightning_hetero; print(len(ours()))")

    assert FAILED in output
    assert output.startswith("1\n")  # still waiting for the other namespaces


def test_the_finder_leaves_when_there_is_nothing_left_to_wait_for(run: Callable[..., str]) -> None:
    output = run(
        "import lightning_hetero; importlib.import_module(CONNECTOR); print(len(ours()))\n"
        "from lightning_hetero._autoload import NAMESPACES\n"
        "for name in NAMESPACES: importlib.import_module(name)\n"
        "print(len(ours()))"
    )

    assert output.startswith("1\n0\n")


def test_installing_twice_is_installing_once(run: Callable[..., str]) -> None:
    assert run("from lightning_hetero._autoload import autoload; autoload(); autoload(); print(len(ours()))") == "1\n"


def test_the_off_switch_leaves_no_finder(run: Callable[..., str]) -> None:
    program = "import lightning_hetero; importlib.import_module(CONNECTOR); print(len(ours()))"

    assert run(program, LIGHTNING_HETERO_AUTOREGISTER="0") == "0\n"


def test_a_failed_registration_is_one_line_even_where_warnings_are_errors(run: Callable[..., str]) -> None:
    output = run("import lightning_hetero; importlib.import_module(CONNECTOR)", "-W", "error")

    (line,) = output.splitlines()
    assert line.startswith(FAILED)
    assert "python -c" in line
    assert line.endswith("or set LIGHTNING_HETERO_AUTOREGISTER=0 to do without it.")


def test_the_spec_answers_as_the_original_loader_would(run: Callable[..., str]) -> None:
    output = run(
        "import lightning_hetero; spec = importlib.util.find_spec(CONNECTOR); loader = spec.loader\n"
        "print(loader.get_source(CONNECTOR).strip(), loader.is_package(CONNECTOR), loader.path == spec.origin)"
    )

    assert output == "ANSWER = 42 False True\n"


def test_the_module_carries_its_original_loader(run: Callable[..., str]) -> None:
    output = run(
        "import lightning_hetero; module = importlib.import_module(CONNECTOR)\n"
        "print(type(module.__loader__).__name__, module.__spec__.loader is module.__loader__)\n"
        "print(inspect.getsource(module).strip(), importlib.reload(module).ANSWER)"
    )

    assert output.startswith("SourceFileLoader True\nANSWER = 42 42\n")


def test_an_error_of_lightning_itself_passes_through_and_the_next_attempt_registers(
    run: Callable[..., str], tmp_path: Path
) -> None:
    connector = tmp_path / "pytorch_lightning" / "trainer" / "connectors" / "accelerator_connector.py"
    connector.write_text("import sys\nif not hasattr(sys, 'second'): sys.second = True; raise KeyError('broken')\n")
    output = run(
        "import lightning_hetero\n"
        "try: importlib.import_module(CONNECTOR)\n"
        "except KeyError as error: print(error, type(error.__cause__).__name__)\n"
        "importlib.import_module(CONNECTOR)"
    )

    assert output.startswith("'broken' NoneType\n")
    assert output.count(FAILED) == 1


def test_another_hook_that_asks_all_finders_does_not_send_us_in_circles(run: Callable[..., str]) -> None:
    output = run(
        "import lightning_hetero\n"
        "class Other:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)\n"
        "        return next((spec for spec in others if spec), None)\n"
        "sys.meta_path.insert(0, Other()); importlib.import_module(CONNECTOR)"
    )

    assert output.count(FAILED) == 1


def test_importing_the_package_imports_nothing_but_the_standard_library(run: Callable[..., str]) -> None:
    output = run(
        "before = set(sys.modules); import lightning_hetero\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )

    assert output == "['lightning_hetero']\n"
