"""Adding the accelerator to a process: once, one kind, by name or by what the machine has."""

from __future__ import annotations

import itertools
import subprocess
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_hetero.testing
from lightning_hetero.errors import UsageError
from lightning_hetero.testing import EmulatedAccelerator, cpp_build, install_accelerator

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# What a machine without a compiler looks like.
NO_COMPILER = {"CXX": "no-such-compiler"}


def test_installing_again_gives_the_same_accelerator(accelerator: EmulatedAccelerator) -> None:
    assert install_accelerator() is accelerator
    assert install_accelerator(accelerator.kind) is accelerator


def test_one_process_has_one_kind(accelerator: EmulatedAccelerator) -> None:
    other = "python" if accelerator.kind == "cpp" else "cpp"
    with pytest.raises(
        UsageError, match=rf"of kind '{accelerator.kind}' already.*Ask for kind='{other}' in a new proc"
    ):
        install_accelerator(other)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kind must be 'auto', 'cpp' or 'python', got 'rust'$"):
        install_accelerator("rust")  # type: ignore[arg-type]


REFUSALS = """
import os
import torch
from lightning_hetero.testing import install_accelerator

def attempt(kind):
    try:
        install_accelerator(kind)
    except Exception as error:
        print(type(error).__name__, error)

for count in ("0", "65", "two", "-1"):
    os.environ["LIGHTNING_HETERO_EMULATED_DEVICES"] = count
    attempt("auto")
os.environ["LIGHTNING_HETERO_EMULATED_DEVICES"] = "2"
torch.utils.rename_privateuse1_backend("npu")
for kind in ("cpp", "python", "auto"):
    attempt(kind)
"""


def test_a_wrong_number_of_devices_and_a_taken_place_are_refused(run_python: RunPython) -> None:
    count = "ValueError LIGHTNING_HETERO_EMULATED_DEVICES must be a number of devices from 1 to 64, got "
    taken = (
        "UsageError torch knows one extra device type per process, and that of this process is 'npu' already. Install "
        "the emulated accelerator 'dev' in a process that does not import the other one."
    )
    run = run_python("-c", REFUSALS)
    assert run.stdout.splitlines() == [*(count + repr(text) for text in ("0", "65", "two", "-1")), *[taken] * 3]


INSTALL = """
import sys, torch
from lightning_hetero.testing import install_accelerator
accelerator = install_accelerator(sys.argv[1])
print(accelerator.kind, accelerator.devices, (torch.ones(2, device=accelerator.devices[-1]) + 1).tolist())
"""


def test_without_a_compiler_auto_is_python_and_cpp_says_what_is_missing(run_python: RunPython, tmp_path: Path) -> None:
    machine = {**NO_COMPILER, cpp_build.CACHE_VARIABLE: str(tmp_path / "cache")}
    auto = run_python("-c", INSTALL, "auto", LIGHTNING_HETERO_EMULATED_DEVICES="3", **machine)
    assert (auto.stdout, auto.stderr) == ("python ('dev:0', 'dev:1', 'dev:2') [2.0, 2.0]\n", "")
    cpp = run_python("-c", INSTALL, "cpp", **machine)
    assert cpp.stderr.splitlines()[-1] == (
        "lightning_hetero.testing.cpp_build.BuildError: the C++ backend of the emulated accelerator must be compiled, "
        "and this machine lacks a C++ compiler (there is no 'no-such-compiler' on the PATH; the variable CXX can name "
        "another). Install it, or take the backend that needs no compiler: install_accelerator('python')."
    )
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_quoted_and_auto_goes_on_in_python(
    run_python: RunPython, compiler: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    complaint = "internal compiler error: on purpose"
    broken.write_text(
        f"""#!/bin/sh\ncase "$*" in *" -c "*) echo '{complaint}'; exit 1;; esac\nexec {compiler} "$@"\n"""
    )
    broken.chmod(0o755)
    run = run_python("-c", INSTALL, "auto", CXX=str(broken), LIGHTNING_HETERO_CACHE_DIR=str(tmp_path / "cache"))
    assert run.stdout == "python ('dev:0', 'dev:1') [2.0, 2.0]\n"
    for words in (
        "RuntimeWarning: The Python backend of the emulated accelerator is used: the C++ backend of the emulated",
        "Install a compiler that works and name it in the variable CXX, or take the backend that needs no compiler",
        complaint,
    ):
        assert words in run.stderr
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_public_names_are_documented_and_light(run_python: RunPython) -> None:
    names = lightning_hetero.testing.__all__
    assert names == sorted(names)
    for name in names:
        thing = getattr(lightning_hetero.testing, name)
        assert thing.__doc__
        assert not thing.__doc__.startswith(f"{name}(")
        assert name in (lightning_hetero.testing.__doc__ or "")
        if isinstance(thing, type):
            methods = [getattr(thing, method) for method in vars(thing) if not method.startswith("_")]
            assert [method for method in methods if callable(method) and not method.__doc__] == []
    assert typing.get_type_hints(install_accelerator)["return"] is EmulatedAccelerator
    assert run_python("-c", "import sys, lightning_hetero.testing; print('torch' in sys.modules)").stdout == "False\n"


def test_the_program_in_the_documentation_runs(run_python: RunPython) -> None:
    indented = (lightning_hetero.testing.__doc__ or "").partition("::\n")[2].splitlines()
    program = "\n".join(itertools.takewhile(lambda line: not line or line.startswith("    "), indented))
    assert "accelerator.configure" in program
    run = run_python("-c", f"{textwrap.dedent(program)}\nprint('ran')")
    assert (run.stdout, run.stderr) == ("ran\n", "")
