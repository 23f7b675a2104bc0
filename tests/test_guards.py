"""The guards of conftest: each kind of trace is left once by a small test of its own, and must be reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

HEAD = """
import os, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch

ROOT = os.getcwd()

class Finder:
    def find_spec(self, name, path=None, target=None):
        return None
"""

LEAKS = {
    "thread_that_keeps_python_alive": (
        "stop = threading.Event(); threading.Thread(target=stop.wait, args=(4,), name='left').start()",
        r"new thread: 'left'",
    ),
    "daemon_thread_of_ours": (
        "threading.Thread(target=time.sleep, args=(4,), name='hetero-cpu', daemon=True).start()",
        r"new thread: 'hetero-cpu'",
    ),
    "child_process": (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(4)'])",
        r"new child process: \d+ \(.*time\.sleep\(4\)",
    ),
    "environment_variable": ("os.environ['SOME_VARIABLE'] = '1'", r"new environment variable: SOME_VARIABLE"),
    "changed_variable": (
        "os.environ['HOME'] = '/nowhere'",
        r"environment variable changed: HOME, from .* to '/nowhere'",
    ),
    "removed_variable": ("del os.environ['PATH']", r"environment variable gone: PATH"),
    "import_hook": ("sys.meta_path.append(Finder())", r"new import hook: <.*Finder"),
    "forward_hook": (
        "torch.nn.modules.module.register_module_forward_hook(print)",
        r"new global module hook: _global_forward_hooks\[\d+\]",
    ),
    "parameter_hook": (
        "torch.nn.modules.module.register_module_parameter_registration_hook(print)",
        r"new global module hook: _global_parameter_registration_hooks\[\d+\]",
    ),
    "patched_method": (
        "old = torch.nn.Module.to; torch.nn.Module.to = lambda self, *a: old(self, *a)",
        r"attribute of a torch class changed: Module\.to",
    ),
    "added_method": ("torch.Tensor.twice = lambda self: self * 2", r"new attribute of a torch class: Tensor\.twice"),
    "function_mode": (
        "torch.overrides.BaseTorchFunctionMode().__enter__()",
        r"state of torch changed: depth of torch function modes, from 0 to 1",
    ),
    "default_dtype": (
        "torch.set_default_dtype(torch.float64)",
        r"default dtype, from torch\.float32 to torch\.float64",
    ),
    "deterministic_flag": (
        "torch.use_deterministic_algorithms(True)",
        r"deterministic algorithms, from False to True",
    ),
    "number_of_threads": ("torch.set_num_threads(2)", r"number of threads, from 1 to 2"),
    "grad_mode": ("torch.set_grad_enabled(False)", r"grad mode, from True to False"),
    "working_directory": ("os.chdir('/')", r"working directory changed: cwd"),
    "file": ("Path(ROOT, 'left.txt').write_text('')", r"new file outside tmp_path: left\.txt"),
}

CLEAN = """
def test_a_clean_test_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "1")
    monkeypatch.setattr(torch.nn.Module, "to", None)
    (tmp_path / "file.txt").write_text("")
    short = threading.Thread(target=time.sleep, args=(0.05,))
    short.start()
    with torch.overrides.BaseTorchFunctionMode(), torch.no_grad():
        subprocess.run([sys.executable, "-c", ""], check=True)

def test_lightning_may_leave_its_seed():
    os.environ["PL_GLOBAL_SEED"] = "7"

def test_which_the_next_test_does_not_see():
    assert "PL_GLOBAL_SEED" not in os.environ

@pytest.mark.cuda
def test_that_needs_cuda():
    raise AssertionError("CUDA is hidden from this run")
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> str:
    """What pytest says about all these tests, run under a copy of our conftest with less patience."""
    root = tmp_path_factory.mktemp("leaky")
    ours = (pytestconfig.rootpath / "tests" / "conftest.py").read_text(encoding="utf-8")
    # What a test here leaves behind stays for seconds: nothing would be waited for but the end of the patience.
    hasty, times = re.subn(r"patience_s=2\.0", "patience_s=0.3", ours)
    assert times == 2
    (root / "conftest.py").write_text(hasty, encoding="utf-8")
    (root / "pytest.ini").write_text("[pytest]\nmarkers = cuda: needs CUDA\n")
    leaking = [f"def test_{name}():\n    {code}\n" for name, (code, _) in LEAKS.items()]
    (root / "test_leaks.py").write_text("\n".join([HEAD, CLEAN, *leaking]))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(root)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(pytestconfig.rootpath), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return run.stdout + run.stderr


@pytest.mark.parametrize("name", LEAKS)
def test_a_trace_is_reported_by_its_guard(name: str, output: str) -> None:
    _, found, after = output.partition(f"ERROR at teardown of test_{name} ")
    report = after.partition("ERROR at teardown")[0]

    assert found, output
    assert "undo it in a fixture or a `finally`" in report
    assert re.search(LEAKS[name][1], report), report


def test_tests_that_clean_up_pass_and_cuda_is_skipped_with_a_reason(output: str) -> None:
    counts = f"{len(LEAKS) + 3} passed, 1 skipped, {len(LEAKS)} errors"  # a leak is an error after its test passed

    assert counts in output
    assert "no CUDA device, or not asked for by pytest -m cuda" in output
