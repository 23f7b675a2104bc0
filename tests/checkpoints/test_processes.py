"""Several processes: one writes, all verify, and each goes on with its own random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launch
import pytest

PROGRAM = str(Path(__file__).with_name("resuming.py"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[launch.Ended]:
    """Both processes, at their end."""
    return launch.run([PROGRAM, str(tmp_path_factory.mktemp("resume"))], 2)


def said(process: launch.Ended) -> dict[str, Any]:
    lines = [line for line in process.text.splitlines() if line.startswith('{"equal"')]
    assert len(lines) == 1, process.text
    return json.loads(lines[0])  # type: ignore[no-any-return]


@pytest.mark.feature("processes: exact resume")
@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_goes_on_with_its_own_random_numbers(ended: list[launch.Ended], rank: int) -> None:
    words = said(ended[rank])
    assert words["equal"]
    assert (words["processes"], words["alike"]) == (2, False)


def test_one_process_writes_and_leaves_nothing_else(ended: list[launch.Ended]) -> None:
    assert said(ended[0])["files"] == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]


def test_a_file_that_is_damaged_on_one_host_ends_the_run_on_all(ended: list[launch.Ended]) -> None:
    whole, damaged = ended
    assert (whole.code, damaged.code) == (1, 1)
    assert "copy-1.ckpt is damaged: its bytes do not have the sha256" in damaged.text
    assert "Process 1 failed with CheckpointError" in whole.text
