from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_hetero
from lightning_hetero.devices import DeviceSpec, Inventory, resolve_devices
from lightning_hetero.profile import ModelProfile, estimate_profile
from lightning_hetero.profile.cache import ProfileCache, cache_key
from lightning_hetero.profile.recording import Recording

Record = Callable[..., Recording]


@pytest.fixture
def recording(record: Record) -> Recording:
    return record(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4))


@pytest.fixture
def key(recording: Recording, cpus: Inventory) -> dict[str, Any]:
    return cache_key(recording, cpus, rows=8, training=True)


@pytest.fixture
def profile(recording: Recording, cpus: Inventory) -> ModelProfile:
    return estimate_profile(recording.graph, cpus, rows=8, flows=recording.flows)


def test_what_was_put_is_got(tmp_path: Path, key: dict[str, Any], profile: ModelProfile) -> None:
    cache = ProfileCache(tmp_path / "not" / "there")
    assert cache.get(key) is None
    cache.put(key, profile)

    assert cache.get(key) == profile
    assert ProfileCache(tmp_path / "not" / "there").get(key) == profile
    assert [path.name for path in cache.folder.iterdir()] == [cache.path(key).name]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '{"format": "something else"}', "\x00\xff" * 9, "[" * 100_000],
    ids=["empty", "cut", "list", "number", "null", "foreign", "binary", "deep"],
)
def test_a_damaged_file_is_written_anew(
    tmp_path: Path, key: dict[str, Any], profile: ModelProfile, content: str
) -> None:
    cache = ProfileCache(tmp_path)
    cache.path(key).write_text(content, encoding="latin-1")

    assert cache.get(key) is None
    cache.put(key, profile)
    assert cache.get(key) == profile


def test_a_file_with_a_damaged_profile_or_of_another_key_is_none(
    tmp_path: Path, key: dict[str, Any], profile: ModelProfile
) -> None:
    cache = ProfileCache(tmp_path)
    cache.put(key, profile)
    whole = json.loads(cache.path(key).read_text())
    for damaged in (
        {**whole, "profile": {**whole["profile"], "units": [{"name": "x", "colour": "red"}]}},
        {**whole, "key": {**key, "rows": 9}},
        {**whole, "version": 1},
    ):
        cache.path(key).write_text(json.dumps(damaged))
        assert cache.get(key) is None


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path, key: dict[str, Any], profile: ModelProfile) -> None:
    (tmp_path / "file").touch()
    cache = ProfileCache(tmp_path / "file" / "below")
    cache.put(key, profile)

    assert cache.get(key) is None


def test_a_writer_that_fails_leaves_no_part_behind(tmp_path: Path, key: dict[str, Any], profile: ModelProfile) -> None:
    cache = ProfileCache(tmp_path)
    cache.path(key).mkdir()  # so that the last step, the exchange, fails
    cache.put(key, profile)

    assert [path.name for path in tmp_path.iterdir()] == [cache.path(key).name]


def test_the_place_is_that_of_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ProfileCache().folder == tmp_path / "lightning_hetero" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert ProfileCache().folder == tmp_path / "home" / ".cache" / "lightning_hetero" / "profiles"


def test_speeds_and_rates_matter_where_seconds_follow_from_them(recording: Recording) -> None:
    cpu = resolve_devices("cpu").root
    away = DeviceSpec(name="hpu:7", kind="hpu", torch_device="hpu:7", memory_bytes=2**30)

    def key(*devices: DeviceSpec) -> dict[str, Any]:
        return cache_key(recording, Inventory(devices=devices), rows=8, training=True)

    assert key(cpu) == key(replace(cpu, speed=2.0, launch_s=1e-6))
    assert key(cpu, away) != key(replace(cpu, speed=2.0), away)
    assert key(cpu, away) != key(cpu, replace(away, launch_s=1e-6))


def test_the_key_knows_what_seconds_depend_on(
    recording: Recording, cpus: Inventory, key: dict[str, Any], record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(recording: Recording = recording, inventory: Inventory = cpus, **more: Any) -> dict[str, Any]:
        return cache_key(recording, inventory, **{"rows": 8, "training": True, **more})

    def same(inventory: Inventory = cpus, **changed: Any) -> Inventory:
        return replace(inventory, devices=tuple(replace(device, **changed) for device in inventory))

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert again() == key
    assert again(record(net, torch.randn(8, 4))) == key
    assert again(inventory=same(memory_bytes=1000)) == key
    assert again(inventory=same(launch_s=1e-6, measured="measured")) == key

    assert again(record(net, torch.randn(6, 4))) != key
    assert again(record(net.double(), torch.randn(8, 4).double())) != key
    assert again(record(net.float().eval(), torch.randn(8, 4))) != key
    assert again(inventory=same(speed=3.0)) != key
    assert again(rows=4) != key
    assert again(training=False) != key
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert again() != key
    with monkeypatch.context() as patch:
        patch.setattr(lightning_hetero, "__version__", "9.9")
        assert again() != key
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert again() != key
    finally:
        torch.set_num_threads(threads)
