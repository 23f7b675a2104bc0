"""Shares follow the speed of the processes, and every row is still seen once."""

from __future__ import annotations

import json
from pathlib import Path

import jobs
import launch

PROGRAM = str(Path(__file__).with_name("balancing.py"))


def test_a_slow_process_gets_fewer_rows(tmp_path: Path) -> None:
    started = {}
    for name, *options in (("0",), ("2",), ("0", "norm")):
        folder = tmp_path / (name + "".join(options))
        folder.mkdir()
        started[folder] = launch.start([PROGRAM, str(folder), name, *options], 2)
    for folder, processes in started.items():
        for process in launch.wait(processes):
            assert process.code == 0, process.text
        slow, fast = (json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1))
        assert len(slow[0]) >= len(fast[0])
        assert 1.5 * len(slow[-1]) < len(fast[-1])
        for epoch, rows in enumerate(slow):
            assert sorted(rows + fast[epoch]) == list(range(jobs.ROWS))
