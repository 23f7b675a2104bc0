"""Measuring real devices: the CPU, devices that it plays, and the emulated accelerator. Nothing asks how fast."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from lightning_hetero.devices import DeviceSpec, Inventory, Link, measured_inventory, resolve_devices
from lightning_hetero.devices import numbers as numbers_module
from lightning_hetero.devices.bench import Bench
from lightning_hetero.devices.cards import cards_inventory
from lightning_hetero.devices.machine_key import machine_key
from lightning_hetero.devices.measure import measure
from lightning_hetero.devices.numbers import DeviceNumbers, DeviceProfile, LinkNumbers, confidence
from lightning_hetero.devices.origins import LOW_CONFIDENCE, MEASURED
from lightning_hetero.devices.profile_files import DeviceCache
from lightning_hetero.devices.stopwatch import Timing, intra_op_threads, seconds
from lightning_hetero.errors import InventoryError
from lightning_hetero.testing import EmulatedAccelerator

KEPT = DeviceNumbers(
    device="cpu", flops_per_s=(("float32", 1e11), ("float64", 5e10)), memory_bytes_per_s=2e10, launch_s=2e-6
)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lightning_hetero" / "devices"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without other work, on which any two passes agree."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(numbers_module, "MOST_SPREAD", float("inf"))


def keep(inventory: Inventory, *numbers: DeviceNumbers, links: tuple[LinkNumbers, ...] = ()) -> Path:
    """Put numbers where a run before this one would have put them."""
    key = machine_key(device for device in inventory if not device.emulated)
    DeviceCache().put(key, DeviceProfile(numbers, links))
    return DeviceCache().path(key)


def test_every_number_of_real_devices_and_their_links_is_measured(accelerator: EmulatedAccelerator) -> None:
    inventory = measured_inventory(resolve_devices([accelerator.devices[0], "cpu"]))

    for device in inventory:
        rates = dict(device.flops_per_s)
        assert rates.keys() == set(device.dtypes)
        assert all(rate > 0 for rate in rates.values())
        assert device.memory_bytes_per_s is not None
        assert device.launch_s is not None
        assert device.measured in (MEASURED, LOW_CONFIDENCE)
    assert inventory["cpu"].speed == 1
    first, host = (dict(device.flops_per_s)["float32"] for device in inventory)
    assert inventory.devices[0].speed == first / host
    for ends in permutations(inventory.names, 2):
        link = inventory.link(*ends)
        assert link.bandwidth_bytes_per_s is not None
        assert link.bandwidth_bytes_per_s > 0
        assert link.latency_s is not None
        assert link.latency_s > 0
        assert link.measured in (MEASURED, LOW_CONFIDENCE)


def test_two_accelerators_are_linked_in_both_directions(accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    first, second = (Bench(name, None, 2**24, ("float32",)) for name in accelerator.devices)
    found = measure([], [(first, second), (second, first)])

    assert [(link.source, link.target) for link in found.links] == [*permutations(accelerator.devices)]
    assert accelerator.stats(0).d2d_bytes > 0
    assert accelerator.stats(1).d2d_bytes > 0
    assert all(spread >= 0 for link in found.links for _, spread in link.spreads)


def test_a_dtype_that_a_device_lacks_is_left_out(accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    accelerator.configure(0, missing_dtypes=[torch.float64])
    try:
        found = measure([Bench(accelerator.devices[0], None, 2**24, ("float64", "float32"))], [])
    finally:
        accelerator.reset()
    assert [dtype for dtype, _ in found.devices[0].flops_per_s] == ["float32"]


def test_measuring_leaves_random_numbers_threads_and_memory_alone(accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    before = torch.get_rng_state(), torch.get_num_threads(), accelerator.stats(0).used_bytes
    benches = [Bench("cpu", 1, 2**24, ("float32",)), Bench(accelerator.devices[0], None, 2**24, ("float32",))]
    measure(benches, [(benches[0], benches[1])])

    assert torch.equal(before[0], torch.get_rng_state())
    assert (torch.get_num_threads(), accelerator.stats(0).used_bytes) == before[1:]


def test_an_emulated_device_has_the_numbers_of_the_cpu_slowed_down_as_it_runs() -> None:
    inventory = resolve_devices("cpu@speed=4,cpu@speed=1")
    keep(inventory, KEPT)
    fast, slow = measured_inventory(inventory)

    assert fast.flops_per_s == KEPT.flops_per_s
    assert slow.flops_per_s == (("float32", 2.5e10), ("float64", 1.25e10))
    assert (fast.memory_bytes_per_s, slow.memory_bytes_per_s) == (2e10, 5e9)
    assert (fast.launch_s, slow.launch_s) == (2e-6, 8e-6)
    assert (fast.speed, slow.speed) == (4, 1)  # what the user said


def test_an_emulated_device_with_threads_of_its_own_is_measured_with_them() -> None:
    inventory = resolve_devices("cpu@speed=1,cpu@speed=1,threads=1")
    keep(inventory, KEPT, replace(KEPT, threads=1, launch_s=7e-6))
    assert [device.launch_s for device in measured_inventory(inventory)] == [2e-6, 7e-6]


def test_emulated_links_stay_as_the_inventory_gives_them() -> None:
    inventory = resolve_devices("cpu@speed=1,cpu@speed=1")
    given = Link(source="emulated:0", target="emulated:1", bandwidth_bytes_per_s=1e6, latency_s=0.1)
    inventory = replace(inventory, links=(given,))
    keep(inventory, KEPT, links=(LinkNumbers(source="cpu", target="cpu", bandwidth_bytes_per_s=1, latency_s=1),))
    assert measured_inventory(inventory).links == (given,)


def test_what_the_user_gave_is_not_measured(cache_home: Path) -> None:
    given = replace(resolve_devices("cpu").root, flops_per_s=(("float32", 5.0),))
    assert measured_inventory(Inventory(devices=(given,)), refresh=True).root == replace(given, speed=1.0)
    assert not cache_home.exists()


def test_what_the_user_gave_is_kept_among_what_is_measured() -> None:
    given = replace(resolve_devices("cpu").root, launch_s=1e-3)
    keep(Inventory(devices=(given,)), KEPT)
    measured = measured_inventory(Inventory(devices=(given,))).root
    assert (measured.launch_s, measured.memory_bytes_per_s) == (1e-3, KEPT.memory_bytes_per_s)


def test_hardware_by_its_data_sheet_is_left_as_it_is(cache_home: Path) -> None:
    cards = cards_inventory("1xt4+1x24GiB")
    assert measured_inventory(cards, refresh=True) == cards
    assert not cache_home.exists()


@pytest.mark.usefixtures("quiet")
def test_what_was_measured_is_kept_for_the_next_time() -> None:
    inventory = resolve_devices("cpu")
    first = measured_inventory(inventory)
    assert first.root.measured == MEASURED
    path = DeviceCache().path(machine_key(inventory))
    kept = DeviceCache().get(machine_key(inventory))
    assert kept.devices[0].flops_per_s == first.root.flops_per_s
    assert {name for name, _ in kept.devices[0].spreads} == {*first.root.dtypes, "memory", "launch"}

    # If the second call measured, it would not find this.
    path.write_text(path.read_text().replace(str(first.root.launch_s), "123.0"))
    assert measured_inventory(inventory).root.launch_s == 123
    assert measured_inventory(inventory, cache=False).root.launch_s != 123
    assert measured_inventory(inventory, refresh=True).root.launch_s != 123
    assert DeviceCache().get(machine_key(inventory)).devices[0].launch_s != 123


@pytest.mark.usefixtures("quiet")
def test_only_what_is_missing_is_measured(accelerator: EmulatedAccelerator) -> None:
    inventory = resolve_devices([accelerator.devices[0], "cpu"])
    name = accelerator.devices[0]
    links = (
        LinkNumbers(source=name, target="cpu", bandwidth_bytes_per_s=1e9, latency_s=1e-5),
        LinkNumbers(source="cpu", target=name, bandwidth_bytes_per_s=2e9, latency_s=1e-5),
    )
    keep(inventory, KEPT, links=links)
    measured = measured_inventory(inventory)

    assert measured["cpu"].flops_per_s == KEPT.flops_per_s
    assert measured[name].measured == MEASURED
    assert measured.link("cpu", name).bandwidth_bytes_per_s == 2e9
    assert {numbers.device for numbers in DeviceCache().get(machine_key(inventory)).devices} == {"cpu", name}


def test_a_busy_machine_is_not_believed(monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 0.0, 0.0))
    measured = measured_inventory(resolve_devices("cpu"))
    assert measured.root.measured == LOW_CONFIDENCE
    assert measured.root.flops_per_s
    assert not cache_home.exists()


def test_low_confidence_is_measured_again() -> None:
    noisy = replace(resolve_devices("cpu").root, flops_per_s=(("float32", 5.0),), measured=LOW_CONFIDENCE)
    keep(Inventory(devices=(noisy,)), KEPT)
    assert measured_inventory(Inventory(devices=(noisy,))).root.flops_per_s == KEPT.flops_per_s


@pytest.mark.parametrize(
    ("spreads", "busy", "expected"),
    [
        ((0.0, 0.3), False, MEASURED),
        ((0.0, 0.31), False, LOW_CONFIDENCE),
        ((0.0,), True, LOW_CONFIDENCE),
        ((), False, MEASURED),
    ],
)
def test_confidence(spreads: tuple[float, ...], busy: bool, expected: str) -> None:
    assert confidence(spreads, busy=busy) == expected


def test_a_timing_is_the_shortest_and_how_near_another_pass_came() -> None:
    timing = Timing.of_passes([3.0, 0.5, 0.4])
    assert timing.best_s == 0.4
    assert timing.spread == pytest.approx(0.25)


def test_threads_are_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def fail() -> None:
        with intra_op_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_the_cache_knows_machines_apart() -> None:
    cpu = resolve_devices("cpu").root
    one, other = machine_key([cpu]), machine_key([replace(cpu, label="another processor")])
    assert DeviceCache().path(one) != DeviceCache().path(other)
    DeviceCache().put(one, DeviceProfile((KEPT,)))
    assert DeviceCache().get(other) == DeviceProfile()


def test_links_of_devices_that_are_elsewhere_stay_unknown() -> None:
    rates = (("float32", 1e12),)
    elsewhere = DeviceSpec(name="xla:0", kind="xla", memory_bytes=2**30, torch_device="xla:0", flops_per_s=rates)
    host = replace(resolve_devices("cpu").root, flops_per_s=(("float32", 1e11),))
    measured = measured_inventory(Inventory(devices=(elsewhere, host)))
    assert [device.speed for device in measured] == [10, 1]
    assert measured.links == ()


def test_the_clock_waits_for_devices_before_and_after(
    accelerator: EmulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    module = torch.get_device_module(accelerator.name)
    monkeypatch.setattr(module, "synchronize", lambda device: happened.append(str(device)))
    devices = [torch.device(name) for name in accelerator.devices]
    assert seconds(lambda: happened.append("work"), [*devices, torch.device("cpu")]) > 0
    assert happened == [*accelerator.devices, "work", *accelerator.devices]


@pytest.mark.cuda
def test_a_cuda_device_and_its_links_are_measured() -> None:
    measured = measured_inventory(resolve_devices("cuda:0,cpu"))
    assert dict(measured["cuda:0"].flops_per_s).keys() == set(measured["cuda:0"].dtypes)
    for ends in (("cuda:0", "cpu"), ("cpu", "cuda:0")):
        assert measured.link(*ends).bandwidth_bytes_per_s is not None
        assert measured.link(*ends).pinned_bandwidth_bytes_per_s is not None


def test_a_device_that_is_not_here_is_named() -> None:
    elsewhere = DeviceSpec(name="xla:0", kind="xla", memory_bytes=2**30, torch_device="xla:0")
    with pytest.raises(
        InventoryError, match=r"device 'xla:0' cannot be measured: .*Leave it out, or write its numbers"
    ):
        measured_inventory(Inventory(devices=(elsewhere,)))


def test_a_device_without_a_dtype_to_multiply_in_is_named() -> None:
    with pytest.raises(InventoryError, match="'cpu' cannot be measured: it has multiplied no matrices, in any of its"):
        measure([Bench("cpu", None, 2**30, ("float3",))], [])
