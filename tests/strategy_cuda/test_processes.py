"""Two processes, started by torchrun, one on the GPU and one on the CPU: the losses of one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).with_name("two_processes.py")
BOUND = 1e-12  # in float64, with SGD


def program() -> Any:
    """The module that the processes run."""
    spec = importlib.util.spec_from_file_location("two_processes", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # four imports of everything
@pytest.mark.parametrize("shares", [[], ["3:1"]], ids=["same", "3:1"])
def test_the_losses_of_one_process(
    shares: list[str], places: list[str], gpu: Any, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(PROGRAM), str(tmp_path), ",".join(places), *shares],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(pytestconfig.rootpath)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [rank["devices"] for rank in ranks] == [(place,) for place in places], done.stdout
    whole = program().train([gpu.name, "cpu"], tmp_path, placement="round_robin")
    assert set(whole["devices"]) == set(places)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(whole["losses"], rel=0, abs=BOUND), done.stdout
        for name, value in whole["state"].items():
            torch.testing.assert_close(rank["state"][name], value, rtol=0, atol=BOUND)
