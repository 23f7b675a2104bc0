"""Device profiles on disk: round trips, files of users, and mistakes in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.devices import Inventory, measured_inventory
from lightning_hetero.devices.numbers import DeviceNumbers, DeviceProfile, LinkNumbers
from lightning_hetero.devices.origins import LOW_CONFIDENCE, ORIGINS
from lightning_hetero.devices.profile_files import DeviceCache, read_device_profile
from lightning_hetero.errors import InventoryError

HEAD = {"format": "lightning_hetero device profile", "version": 1}
CPU = {"device": "cpu", "flops_per_s": {"float32": 1e11}}
GPU = {"device": "cuda:0", "flops_per_s": {"float32": 2e13, "bfloat16": 3e14}, "memory_bytes_per_s": 1e12}
SECOND = {"device": "cuda:1", "flops_per_s": {"float32": 1e13}}
LINKS = [
    {"source": a, "target": b, "bandwidth_bytes_per_s": 2.5e10, "latency_s": 1e-5}
    for a in ("cuda:0", "cuda:1", "cpu")
    for b in ("cuda:0", "cuda:1", "cpu")
    if a != b
]
texts = st.text(max_size=8)
rates = st.floats(min_value=1e-9, max_value=1e18)
pairs = st.dictionaries(texts, rates, min_size=1, max_size=3).map(lambda rates: tuple(rates.items()))
device_numbers = st.builds(
    DeviceNumbers,
    device=texts,
    threads=st.none() | st.integers(1, 99),
    flops_per_s=pairs,
    memory_bytes_per_s=st.none() | rates,
    launch_s=st.none() | rates,
    spreads=pairs,
    measured=st.sampled_from(ORIGINS),
)
link_numbers = st.builds(
    LinkNumbers,
    source=texts,
    target=texts,
    bandwidth_bytes_per_s=rates,
    latency_s=rates,
    pinned_bandwidth_bytes_per_s=st.none() | rates,
    spreads=pairs,
    measured=st.sampled_from(ORIGINS),
)
profiles = st.builds(
    DeviceProfile, st.lists(device_numbers, max_size=3).map(tuple), st.lists(link_numbers, max_size=3).map(tuple)
)


def write(folder: Path, content: Any) -> Path:
    path = folder / "devices.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@given(profiles)
def test_a_profile_survives_json(profile: DeviceProfile) -> None:
    assert DeviceProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@given(profiles, profiles)
def test_of_two_profiles_the_first_one_wins(first: DeviceProfile, second: DeviceProfile) -> None:
    both = first.and_then(second)
    for profile, wins in ((second, False), (first, True)):
        for numbers in profile.devices:
            found = both.device(numbers.device, threads=numbers.threads)
            assert found is not None or not numbers.device
            if wins and numbers.device:
                assert found == first.device(numbers.device, threads=numbers.threads)


def test_a_profile_wins_over_measuring_even_for_devices_that_are_not_here(machine: Inventory, tmp_path: Path) -> None:
    path = write(tmp_path, {**HEAD, "devices": [CPU, GPU, SECOND], "links": LINKS})
    measured = measured_inventory(machine, profile=path)

    assert dict(measured["cuda:0"].flops_per_s) == {"float32": 2e13, "bfloat16": 3e14}
    assert measured["cuda:0"].memory_bytes_per_s == 1e12
    assert [device.speed for device in measured] == [200, 100, 1]
    assert measured.link("cuda:0", "cuda:1") == replace(
        machine.link("cuda:0", "cuda:1"), bandwidth_bytes_per_s=2.5e10, latency_s=1e-5, measured="measured"
    )
    assert measured.link("cpu", "cuda:0").bandwidth_bytes_per_s == 2.5e10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: "),
        ("[]", "is no device profile: its 'format' is not 'lightning_hetero device profile'"),
        ({"format": "lightning_hetero plan", "version": 1}, "is no device profile"),
        (
            {**HEAD, "version": 2},
            "has version 2, and this version of lightning_hetero reads version 1 at most; upgrade",
        ),
        ({**HEAD, "version": "1"}, "is damaged: its version is '1'. Write version 1"),
        ({**HEAD, "devices": {}}, "is damaged: devices must be a list, got {}"),
        ({**HEAD, "devices": [{"device": "cpu"}]}, "is damaged: numbers are incomplete: "),
        ({**HEAD, "devices": [{**CPU, "flop": 1}]}, "unknown key 'flop' of a device's numbers"),
        ({**HEAD, "devices": [{**CPU, "flops_per_s": {}}]}, "flops_per_s must have at least one dtype"),
        ({**HEAD, "devices": [{**CPU, "launch_s": -1}]}, "launch_s must be a finite number > 0, got -1.0"),
        (
            {**HEAD, "devices": [{**CPU, "flops_per_s": {"float32": float("nan")}}]},
            "must be a finite number > 0, got nan",
        ),
        ({**HEAD, "devices": [{**CPU, "measured": "yes"}]}, "measured must be one of '', 'measured', "),
        ({**HEAD, "links": [{"source": "cpu"}]}, "numbers are incomplete: "),
        (
            {**HEAD, "links": [{**LINKS[0], "latency_s": 0}]},
            "link 'cuda:0' to 'cuda:1': latency_s must be a finite number > 0, got 0.0",
        ),
        (
            {**HEAD, "devices": [{**CPU, "device": "cuda:7"}]},
            "speaks of none of the devices cuda:0, cuda:1, cpu; it has cuda:7",
        ),
    ],
)
def test_a_mistake_in_a_profile_is_named(content: Any, message: str, machine: Inventory, tmp_path: Path) -> None:
    with pytest.raises(InventoryError) as caught:
        measured_inventory(machine, profile=write(tmp_path, content))
    assert message in str(caught.value)
    assert "devices.json" in str(caught.value)


def test_a_missing_profile_is_named(machine: Inventory) -> None:
    with pytest.raises(InventoryError, match=r"the device profile 'no\.json' cannot be read: .*give the path of an"):
        measured_inventory(machine, profile="no.json")


def test_the_cache_keeps_what_is_not_noisy(tmp_path: Path) -> None:
    good = DeviceNumbers(device="cpu", flops_per_s=(("float32", 1.0),))
    noisy = replace(good, device="cuda:0", measured=LOW_CONFIDENCE)
    cache = DeviceCache(tmp_path / "devices")
    cache.put({"torch": "2"}, DeviceProfile((noisy,)))
    assert not cache.folder.exists()
    cache.put({"torch": "2"}, DeviceProfile((good, noisy)))
    assert cache.get({"torch": "2"}) == DeviceProfile((good,))
    assert read_device_profile(cache.path({"torch": "2"})) == DeviceProfile((good,))
    assert [path.suffix for path in cache.folder.iterdir()] == [".json"]


@pytest.mark.parametrize("content", ["{", "[]", "", json.dumps(HEAD), json.dumps({**HEAD, "key": {}}), "\x00"])
def test_a_damaged_cache_counts_as_empty_and_is_rewritten(content: str, tmp_path: Path) -> None:
    cache, key = DeviceCache(tmp_path), {"torch": "2"}
    cache.path(key).write_text(content)
    assert cache.get(key) == DeviceProfile()
    profile = DeviceProfile((DeviceNumbers(device="cpu", flops_per_s=(("float32", 1.0),)),))
    cache.put(key, profile)
    assert cache.get(key) == profile


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = DeviceCache(tmp_path / "file" / "devices")
    cache.put({}, DeviceProfile((DeviceNumbers(device="cpu", flops_per_s=(("float32", 1.0),)),)))
    assert cache.get({}) == DeviceProfile()
