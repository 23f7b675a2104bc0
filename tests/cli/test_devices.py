"""`lightning-hetero devices` shows what `resolve_devices` answers."""

from __future__ import annotations

import json
from collections.abc import Callable
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
