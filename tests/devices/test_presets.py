"""Hardware to plan for, in one line: what a request such as "2xrtx4090+1x12GiB+cpu" means, and what it cannot mean."""

from __future__ import annotations

import pytest

from lightning_hetero import Inventory, InventoryError, resolve_devices
from lightning_hetero.devices.cards import cards_inventory, known_cards
from lightning_hetero.devices.here import Here
from lightning_hetero.devices.presets import (
    describes_hardware,
    is_preset_request,
    preset_inventory,
    with_assumptions,
)

GIB = 2**30


def links(inventory: Inventory) -> dict[tuple[str, str], float | None]:
    return {(link.source, link.target): link.bandwidth_bytes_per_s for link in inventory.links}


@pytest.mark.parametrize(
    "request_", ["2x24GiB", "2x24GiB+cpu", "cpu+1xt4", "2xRTX4090, 1xa100-80gb", "1x12GiB+cpu-64GiB"]
)
def test_counted_cards_and_sizes_are_a_preset(request_: str) -> None:
    assert is_preset_request(request_)
    assert describes_hardware(request_)


@pytest.mark.parametrize(
    "request_", ["auto", "cpu", "cuda:0,cpu", "1xcpu", "cpu@speed=1,cpu@speed=0.5", "", None, ["2xt4"]]
)
def test_devices_of_this_machine_are_none(request_: object) -> None:
    assert not is_preset_request(request_)
    assert not describes_hardware(request_)


@pytest.mark.parametrize(("path", "means"), [("cluster.yaml", True), (" MY.JSON ", True), ("cluster.txt", False)])
def test_an_inventory_file_describes_hardware_too(path: str, means: bool) -> None:
    assert describes_hardware(path) is means
    assert not is_preset_request(path)


def test_cards_are_those_of_their_data_sheets_and_the_cpu_stands_beside_them() -> None:
    inventory = preset_inventory("2xRTX4090+1xRTX3060+cpu-64GiB")
    assert inventory.names == ("cuda:0", "cuda:1", "cuda:2", "cpu")
    alone = cards_inventory("2xRTX4090+1xRTX3060")
    assert [(d.label, d.memory_bytes, d.flops_per_s) for d in [*inventory][:3]] == [
        (d.label, d.memory_bytes, d.flops_per_s) for d in alone
    ]
    cpu = inventory["cpu"]
    assert (cpu.kind, cpu.memory_bytes, cpu.label) == ("cpu", 64 * GIB, "a CPU with 64.0 GiB")
    assert inventory.root.name == "cuda:0"


def test_every_device_with_a_data_sheet_says_that_its_numbers_come_from_there() -> None:
    inventory = preset_inventory("1xt4+1x12GiB+cpu-64GiB")
    assert {device.measured for device in inventory} == {"data sheet"}


def test_a_cpu_without_a_size_is_the_one_of_this_machine() -> None:
    here = Here(None)
    cpu = preset_inventory("1xt4+cpu", here)["cpu"]
    assert (cpu.memory_bytes, cpu.label) == (here.cpu.memory_bytes, here.cpu.label)


def test_the_cpu_is_the_root_where_it_comes_first() -> None:
    assert preset_inventory("cpu-8GiB+2xt4").names == ("cpu", "cuda:0", "cuda:1")
    assert preset_inventory("2xt4,cpu-8GiB").names == ("cuda:0", "cuda:1", "cpu")


def test_links_to_the_cpu_are_as_fast_as_the_data_sheet_says_and_unknown_where_there_is_none() -> None:
    rate = known_cards()["t4"].host_link_bytes_per_s
    assert rate is not None
    inventory = preset_inventory("1xt4+1x24GiB+cpu-8GiB")
    found = links(inventory)
    assert (found["cuda:0", "cpu"], found["cpu", "cuda:0"]) == (rate, rate)
    assert (found["cuda:1", "cpu"], found["cpu", "cuda:1"]) == (None, None)
    assert {link.measured for link in inventory.links if "cuda:1" in (link.source, link.target)} == {""}
    assert found.keys() == {(a, b) for a in inventory.names for b in inventory.names if a != b}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("cpu+2xt4+cpu-64GiB", "has 2 CPUs, and there is one device 'cpu'; name it once"),
        ("2xt5+cpu", "there is no data sheet of 't5'. Known are a100-40gb"),
        ("2xrtx409+cpu", "Did you mean 'rtx4090'"),
        ("2xt4+cpu-64Gibb", "'64Gibb' is not a size.*; a CPU with its memory is 'cpu-64GiB'"),
        ("2xt4+cpu-0GiB", "memory_bytes must be > 0"),
        ("0xt4+cpu", "'0xt4' does not count devices; write a number and a card or a memory size"),
        ("2xt4++cpu", "'' does not count devices"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_way_on(request_: str, message: str) -> None:
    with pytest.raises(InventoryError, match=message):
        preset_inventory(request_)


def test_resolve_devices_knows_presets_where_hardware_need_not_be_here() -> None:
    asked = resolve_devices("2x24GiB+1x12GiB+cpu-64GiB", must_exist=False)
    assert asked == preset_inventory("2x24GiB+1x12GiB+cpu-64GiB")
    with pytest.raises(InventoryError):
        resolve_devices("2x24GiB+cpu")


def test_rates_of_which_nothing_is_known_are_assumed_and_named() -> None:
    inventory, notes = with_assumptions(preset_inventory("1xt4+2x24GiB+cpu-64GiB"))
    assert notes == (
        "Rates of cuda:1, cuda:2 are assumed: 20 TFLOP/s in float32, 500 GB/s of memory.",
        "Rates of cpu are assumed: 0.5 TFLOP/s in float32, 40 GB/s of memory.",
    )
    rates = {device.name: dict(device.flops_per_s)["float32"] for device in inventory}
    assert rates == {"cuda:0": rates["cuda:0"], "cuda:1": 20e12, "cuda:2": 20e12, "cpu": 0.5e12}
    assert rates["cuda:0"] == dict(known_cards()["t4"].flops_per_s)["float32"]
    speeds = {device.name: device.speed for device in inventory}
    assert speeds["cuda:1"] / speeds["cpu"] == pytest.approx(40)
    assert speeds["cuda:1"] == speeds["cuda:2"] > speeds["cuda:0"] > speeds["cpu"]


def test_known_rates_and_those_of_emulated_devices_stay() -> None:
    known = cards_inventory("2xt4")
    assert with_assumptions(known) == (known, ())
    emulated = resolve_devices("cpu@speed=1,cpu@speed=0.5")
    assert with_assumptions(emulated) == (emulated, ())
