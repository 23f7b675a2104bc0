"""Every way to ask for devices that works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_hetero.devices import DeviceSpec, Inventory, resolve_devices

GIB = 1024**3
ALL = ("cuda:0", "cuda:1", "cpu")


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (None, ALL),
        ("auto", ALL),
        (-1, ALL),
        ("-1", ALL),
        (1, ("cuda:0",)),
        ("2", ("cuda:0", "cuda:1")),
        (np.int64(3), ALL),
        ("cuda:0,cuda:1,cpu", ALL),
        (" cpu , cuda:1 ", ("cpu", "cuda:1")),
        (["cuda:1", torch.device("cpu")], ("cuda:1", "cpu")),
        (("cuda:0,cuda:1", "cpu"), ALL),
        (torch.device("cuda", 1), ("cuda:1",)),
        (torch.device("cpu", 0), ("cpu",)),
        ("cpu:0", ("cpu",)),
        ("cpu:*", ("cpu",)),
        ("cuda:*", ("cuda:0", "cuda:1")),
        ("cuda:0-1,cpu", ALL),
        ("cuda:1-1", ("cuda:1",)),
        ("gpu:1", ("cuda:1",)),
        ("gpu:*,cpu", ALL),
        ({"cuda:1": None, "cpu": None}, ("cuda:1", "cpu")),
        (OmegaConf.create(["cuda:1", "cpu"]), ("cuda:1", "cpu")),
        (OmegaConf.create({"cuda:1": "8GiB", "cpu": None}), ("cuda:1", "cpu")),
        (OmegaConf.create({"devices": [{"name": "cuda:1"}, "cpu"]}), ("cuda:1", "cpu")),
        ({"devices": "cuda:1,cpu"}, ("cuda:1", "cpu")),
    ],
    ids=repr,
)
def test_a_request_gives_the_devices_in_the_order_in_which_they_are_named(
    request_: Any, names: tuple[str, ...], machine: Inventory
) -> None:
    assert resolve_devices(request_, discovered=machine).names == names


def test_the_only_device_of_a_kind_needs_no_index(machine: Inventory) -> None:
    one_gpu = Inventory(devices=(machine["cuda:1"], machine["cpu"]))
    assert resolve_devices("cuda", discovered=one_gpu).names == ("cuda:1",)
    assert resolve_devices(torch.device("cuda"), discovered=one_gpu).names == ("cuda:1",)
    assert resolve_devices("gpu,cpu", discovered=one_gpu).names == ("cuda:1", "cpu")


@pytest.mark.parametrize(("word", "kind"), [("gpu", "mps"), ("gpu", "newchip"), ("tpu", "xla")])
def test_aliases_mean_the_accelerator_that_exists(word: str, kind: str, machine: Inventory) -> None:
    chip = DeviceSpec(name=f"{kind}:0", kind=kind, memory_bytes=GIB, torch_device=f"{kind}:0")
    here = Inventory(devices=(chip, machine["cpu"]))
    assert resolve_devices(word, discovered=here).names == (f"{kind}:0",)
    assert resolve_devices(f"{word}:0", discovered=here).names == (f"{kind}:0",)


def test_an_exact_name_of_the_inventory_wins(machine: Inventory) -> None:
    named = DeviceSpec(name="big", kind="cuda", memory_bytes=GIB, torch_device="cuda:0")
    here = Inventory(devices=(named, machine["cuda:1"], machine["cpu"]))
    assert resolve_devices("big", discovered=here).names == ("big",)
    assert resolve_devices("cuda:0", discovered=here).names == ("big",)


def test_a_device_and_an_inventory_are_taken_as_they_are(machine: Inventory) -> None:
    assert resolve_devices(machine["cuda:1"], discovered=machine).devices == (machine["cuda:1"],)
    assert resolve_devices([machine["cpu"], "cuda:0"], discovered=machine).names == ("cpu", "cuda:0")
    assert resolve_devices(machine, discovered=machine) == machine


def test_the_first_device_named_is_the_root(machine: Inventory) -> None:
    assert resolve_devices("cpu,cuda:0", discovered=machine).root.name == "cpu"


def test_limits_stand_in_the_request_or_beside_it(machine: Inventory) -> None:
    inside = resolve_devices({"cuda:0": "10GiB", "cpu": None}, discovered=machine)
    beside = resolve_devices("cuda:0,cpu", memory={"cuda:0": "10GiB"}, discovered=machine)
    assert inside == beside
    assert (inside["cuda:0"].memory_bytes, inside["cpu"].memory_bytes) == (10 * GIB, 60 * GIB)


def test_a_limit_of_none_is_no_limit_beside_the_request_too(machine: Inventory) -> None:
    assert resolve_devices("cuda:0,cpu", memory={"cpu": None}, discovered=machine)["cpu"] == machine["cpu"]


def test_a_limit_may_be_more_than_is_free_but_not_more_than_there_is(machine: Inventory) -> None:
    assert resolve_devices("cuda:1", memory={"cuda:1": "24GiB"}, discovered=machine).root.memory_bytes == 24 * GIB


@pytest.mark.parametrize("key", ["cuda:*", "cuda:0-1", "gpu:*"])
def test_a_limit_for_several_devices_is_the_limit_of_each(key: str, machine: Inventory) -> None:
    limited = resolve_devices("auto", memory={key: "5GiB"}, discovered=machine)
    assert [device.memory_bytes // GIB for device in limited] == [5, 5, 60]


def test_a_limit_is_keyed_by_torch_device_too(machine: Inventory) -> None:
    limited = resolve_devices("auto", memory={torch.device("cuda", 1): 2**30}, discovered=machine)
    assert limited["cuda:1"].memory_bytes == GIB


def test_links_host_and_numa_nodes_come_along(machine: Inventory) -> None:
    chosen = resolve_devices("cuda:1,cuda:0", discovered=machine)
    assert set(chosen.links) == set(machine.links)
    assert (chosen.host, chosen.numa_nodes) == ("lab", machine.numa_nodes)


def test_links_that_nobody_knows_are_listed_without_peer_access_unless_they_touch_the_host(
    machine: Inventory,
) -> None:
    bare = Inventory(devices=machine.devices)
    chosen = resolve_devices("auto", discovered=bare)
    assert {(link.source, link.target) for link in chosen.links if not link.peer_access} == {
        ("cuda:0", "cuda:1"),
        ("cuda:1", "cuda:0"),
    }
    assert len(chosen.links) == 6


def test_devices_that_cannot_train_are_left_out_of_auto_but_can_be_named(machine: Inventory) -> None:
    dla = DeviceSpec(name="dla:0", kind="dla", memory_bytes=GIB, torch_device=None, trainable=False)
    here = Inventory(devices=(dla, *machine.devices))
    assert resolve_devices("auto", discovered=here).names == ALL
    chosen = resolve_devices("dla:0,cpu", discovered=here)
    assert (chosen.names, chosen.root.name) == (("dla:0", "cpu"), "cpu")


@given(st.lists(st.sampled_from(ALL), unique=True, min_size=1), st.booleans())
def test_a_text_and_the_list_of_its_parts_mean_the_same(names: list[str], as_torch: bool) -> None:
    here = Inventory(
        devices=tuple(
            DeviceSpec(name=name, kind=name.partition(":")[0], memory_bytes=GIB, torch_device=name) for name in ALL
        )
    )
    parts = [torch.device(name) if as_torch else name for name in names]
    assert resolve_devices(",".join(names), discovered=here) == resolve_devices(parts, discovered=here)
    assert resolve_devices(parts, discovered=here).names == tuple(names)


def test_without_anything_given_the_devices_are_those_of_this_machine(
    run_python: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    code = (
        "from lightning_hetero.devices import discover, resolve_devices\n"
        "assert resolve_devices().names == discover().names, resolve_devices().names\n"
        "assert resolve_devices('cpu').names == ('cpu',)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
