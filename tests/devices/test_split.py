"""Processes on one machine get accelerators of their own."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.devices.split import devices_of_process
from lightning_hetero.errors import InventoryError


def machine(accelerators: int, cpu: bool = True) -> Inventory:
    devices: list[dict[str, Any]] = [
        {"name": f"cuda:{index}", "kind": "cuda", "memory": "8GiB"} for index in range(accelerators)
    ]
    return resolve_devices(
        [*devices, *([{"name": "cpu", "kind": "cpu", "memory": "12GiB"}] if cpu else [])], must_exist=False
    )


def test_one_process_has_everything() -> None:
    assert devices_of_process(machine(3), 0, 1) == machine(3)


def test_each_accelerator_belongs_to_one_process_and_the_memory_of_the_cpu_is_divided() -> None:
    parts = [devices_of_process(machine(3), index, 2) for index in range(2)]
    assert [part.names for part in parts] == [("cuda:0", "cuda:2", "cpu"), ("cuda:1", "cpu")]
    assert [part["cpu"].memory_bytes for part in parts] == [machine(3)["cpu"].memory_bytes // 2] * 2
    assert parts[0]["cuda:0"] == machine(3)["cuda:0"]


def test_a_process_without_an_accelerator_uses_the_cpu() -> None:
    assert devices_of_process(machine(1), 1, 2).names == ("cpu",)


def test_more_processes_than_devices_are_refused() -> None:
    with pytest.raises(InventoryError, match=r"3 processes run on this machine, and its 2 devices.*Start at most 2"):
        devices_of_process(machine(2, cpu=False), 2, 3)
