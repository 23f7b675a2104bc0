"""`lightning-hetero devices` shows what `resolve_devices` answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero import Inventory, resolve_devices
from lightning_hetero.cli import main

UNEQUAL = "cpu@speed=1,mem=2GiB,threads=1,name=large,cpu@speed=0.5,mem=1GiB,name=small"


def test_without_options_all_devices_of_the_machine_are_shown(command: Callable[..., Any]) -> None:
    outcome = command("devices")
    assert outcome.code == 0
    assert all(name in outcome.out for name in resolve_devices("auto").names)


def test_the_table_has_a_row_for_each_device(command: Callable[..., Any]) -> None:
    rows = [line.split("│") for line in command("devices", "--devices", UNEQUAL).out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row[1:6]] for row in rows if row[1].strip()]
    assert cells == [
        ["large", "emulated", "2.00 GiB", "1", "1"],
        ["small", "emulated", "1.00 GiB", "0.5", ""],
    ]


def test_json_reads_back_as_the_inventory(command: Callable[..., Any]) -> None:
    outcome = command("devices", "--devices", UNEQUAL, "--json")
    read = Inventory.from_dict(json.loads(outcome.out))
    assert read.names == ("large", "small")
    assert read["small"].memory_bytes == 2**30


def test_measure_shows_the_pace_of_devices(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outcome = command("devices", "--devices", "cpu,cpu@speed=0.5", "--measure")
    assert outcome.code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    pace = [row for row in rows if len(row) == 8 and row[-1] in ("high", "low confidence")]
    assert [row[0] for row in pace] == ["cpu", "emulated:0"]
    assert all(float(cell) > 0 for row in pace for cell in row[1:-1])
    assert "float32 GFLOP/s" in outcome.out
    assert "launch us" in outcome.out


def test_json_has_the_measured_numbers(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outcome = command("devices", "--devices", "cpu", "--measure", "--refresh", "--json")
    (cpu,) = Inventory.from_dict(json.loads(outcome.out))
    assert dict(cpu.flops_per_s).keys() == set(cpu.dtypes)
    assert cpu.measured in ("measured", "low confidence")


def test_a_profile_is_believed(command: Callable[..., Any], tmp_path: Path) -> None:
    numbers = {"device": "cpu", "flops_per_s": {"float32": 1.5e11}, "launch_s": 2.5e-6}
    profile = {"format": "lightning_hetero device profile", "version": 1, "devices": [numbers]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile))
    outcome = command("devices", "--devices", "cpu", "--profile", str(path))
    row = next(line for line in outcome.out.splitlines() if "150" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["cpu", "?", "150", "?", "?", "?", "2.50", "high"]


def test_a_damaged_profile_is_explained(command: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    outcome = command("devices", "--devices", "cpu", "--profile", str(path))
    assert (outcome.code, outcome.out) == (1, "")
    assert "mine.json' is damaged: " in outcome.err


def test_hardware_is_shown_by_its_data_sheet(command: Callable[..., Any]) -> None:
    outcome = command("devices", "--devices", "1xt4+1x24GiB")
    assert outcome.code == 0
    assert "NVIDIA T4 16GB" in outcome.out
    assert "data sheet" in outcome.out


def test_a_request_that_cannot_be_met_is_explained(command: Callable[..., Any]) -> None:
    outcome = command("devices", "--devices", "cpuu")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("lightning-hetero devices: unknown device 'cpuu'. Available: ")
    assert "Did you mean 'cpu'?" in outcome.err


def test_help_says_how_devices_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["devices", "--help"])
    assert leaving.value.code == 0
    assert "cpu@speed=1,mem=2GiB" in capsys.readouterr().out
