"""`kill -9` at random times while checkpoints are written: what was acknowledged is there, and whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "checkpoints.py"


@pytest.mark.feature("checkpoints: kill -9 during a save")
def test_forty_kills_lose_nothing_and_damage_nothing(run_python: RunPython) -> None:
    ran = run_python(str(PROGRAM), "--quick", OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])["figures"]
    assert figures["kills"] >= 40
    assert figures["lost"] == figures["damaged_loaded"] == figures["damaged_left"] == figures["left_behind"] == 0
    assert figures["flips"] >= 200
    assert figures["flips_loaded"] == 0
    # Without this, the other figures would say nothing: the same flips are there for plain Lightning to find.
    assert figures["lightning_flips_loaded"] > 0
