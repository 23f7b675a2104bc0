"""Devices that the CPU plays: their syntax, both ways, and what they become."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.devices import DeviceSpec, Inventory, format_emulation, resolve_devices
from lightning_hetero.devices.emulated import Emulation, parse_emulation
from lightning_hetero.errors import InventoryError

GIB = 1024**3
CPU = DeviceSpec(
    name="cpu",
    kind="cpu",
    memory_bytes=60 * GIB,
    torch_device="cpu",
    total_memory_bytes=64 * GIB,
    label="Example 9000",
    dtypes=("float64", "float32"),
)
HOST = Inventory(devices=(CPU,))

emulations = st.builds(
    Emulation,
    speed=st.floats(min_value=1e-3, max_value=1e3),
    memory_bytes=st.integers(1, 2**50),
    threads=st.none() | st.integers(1, 512),
)


def test_every_key_may_be_left_out() -> None:
    assert parse_emulation("cpu@speed=3") == Emulation(speed=3.0)
    assert parse_emulation("cpu@mem=2GiB") == Emulation(memory_bytes=2 * GIB)
    assert parse_emulation("cpu@threads=4") == Emulation(threads=4)
    assert parse_emulation("cpu@name=small") == Emulation(name="small")


def test_order_and_spaces_do_not_matter_and_memory_may_be_spelled_out() -> None:
    text = "cpu@ memory = 1GiB , name=a:b , speed = .5,threads=2"
    assert parse_emulation(text) == Emulation(speed=0.5, memory_bytes=GIB, threads=2, name="a:b")


def test_an_emulated_device_computes_on_the_cpu_with_memory_of_its_own() -> None:
    (device,) = resolve_devices("cpu@speed=2,mem=1GiB,threads=1", discovered=HOST)
    assert device == DeviceSpec(
        name="emulated:0",
        kind="emulated",
        memory_bytes=GIB,
        torch_device="cpu",
        total_memory_bytes=GIB,
        label="emulated on Example 9000",
        speed=2.0,
        threads=1,
        dtypes=("float64", "float32"),
        emulated=True,
    )


def test_without_a_memory_it_has_what_the_cpu_may_use() -> None:
    (device,) = resolve_devices("cpu@speed=2", discovered=HOST)
    assert (device.memory_bytes, device.total_memory_bytes) == (60 * GIB, 64 * GIB)


def test_unnamed_devices_are_numbered_in_order_around_the_names_that_are_taken() -> None:
    request = "cpu@speed=1,cpu@name=fast,speed=4,cpu@name=emulated:1,cpu@speed=2,cpu"
    assert resolve_devices(request, discovered=HOST).names == (
        "emulated:0",
        "fast",
        "emulated:1",
        "emulated:2",
        "cpu",
    )


def test_a_machine_without_its_cpu_in_the_inventory_can_still_emulate() -> None:
    gpu = DeviceSpec(name="cuda:0", kind="cuda", memory_bytes=GIB, torch_device="cuda:0")
    found = resolve_devices("cuda:0,cpu@mem=1GiB", discovered=Inventory(devices=(gpu,)))
    assert found.names == ("cuda:0", "emulated:0")


def test_emulated_devices_reach_each_other_and_the_cpu_directly() -> None:
    found = resolve_devices("cpu@speed=1,cpu@speed=2,cpu", discovered=HOST)
    assert len(found.links) == 6
    assert all(link.peer_access for link in found.links)


@given(st.lists(emulations, min_size=1, max_size=4))
def test_what_is_formatted_is_read_back_as_the_same_devices(wanted: list[Emulation]) -> None:
    devices = tuple(emulation.device(f"d{index}", CPU) for index, emulation in enumerate(wanted))
    text = ",".join(map(format_emulation, devices))
    assert resolve_devices(text, discovered=HOST).devices == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu@sped=1", "unknown key 'sped'; known are speed, mem, memory, threads, name. Did you mean 'speed'?"),
        ("cpu@mme=1GiB", "Did you mean 'mem'?"),
        ("cpu@thread=1", "Did you mean 'threads'?"),
        ("cpu@", "'' is not of the form key=value; write for example 'cpu@speed=1,mem=2GiB,threads=1'"),
        ("cpu@fast", "'fast' is not of the form key=value"),
        ("cpu@speed=", "'speed=' is not of the form key=value"),
        ("cpu@speed=fast", "speed=fast: a speed is a finite number > 0"),
        ("cpu@speed=0", "speed=0: a speed is a finite number > 0"),
        ("cpu@speed=nan", "speed=nan: a speed is a finite number > 0"),
        ("cpu@mem=lots", "mem=lots: 'lots' is not a size"),
        ("cpu@mem=0", "mem=0: a memory is more than 0"),
        ("cpu@threads=0", "threads=0: threads are a whole number >= 1"),
        ("cpu@threads=1.5", "threads=1.5: threads are a whole number >= 1"),
        ("cpu@name=9", "name=9: a name starts with a letter"),
        ("cpu@name=cuda:0", "name=cuda:0: a name must not be that of a real device"),
        ("cpu@mem=1GiB,memory=2GiB", "'memory' is given twice; leave one of them out"),
        ("cuda:0@speed=1", "only the CPU can play another device; write for example 'cpu@speed=1"),
        ("speed=1", "'speed=1' belongs to no emulated device; write for example 'cpu@speed=1'"),
        ("cpu,mem=1GiB", "'mem=1GiB' belongs to no emulated device; write for example 'cpu@mem=1GiB'"),
        ("emulated:0", "Emulated devices are made: write for example 'cpu@speed=1,mem=2GiB,threads=1'"),
    ],
)
def test_a_mistake_is_answered_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(InventoryError) as caught:
        resolve_devices(text, discovered=HOST)
    assert message in str(caught.value)
