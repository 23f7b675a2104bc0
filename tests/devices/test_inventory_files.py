"""Inventory files: what people write, what `save_inventory` writes, and mistakes in both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.devices import DeviceSpec, Inventory, Link, NumaNode, resolve_devices, save_inventory
from lightning_hetero.devices.origins import ORIGINS
from lightning_hetero.errors import InventoryError

GIB = 1024**3
texts = st.text(max_size=12)
names = st.text(min_size=1, max_size=12)
sizes = st.integers(1, 2**60)
numbers = st.floats(min_value=0, max_value=1e15)
rates = st.floats(min_value=1e-9, max_value=1e18)
origins = st.sampled_from(ORIGINS)


@st.composite
def devices(draw: st.DrawFn, name: str) -> DeviceSpec:
    trainable = draw(st.booleans())
    return DeviceSpec(
        name=name,
        kind=draw(names),
        memory_bytes=draw(sizes),
        torch_device=draw(names if trainable else st.none() | names),
        total_memory_bytes=draw(st.none() | sizes),
        label=draw(texts),
        speed=draw(st.floats(min_value=1e-6, max_value=1e6)),
        threads=draw(st.none() | st.integers(1, 512)),
        dtypes=draw(st.lists(texts, max_size=3).map(tuple)),
        trainable=trainable,
        emulated=draw(st.booleans()),
        flops_per_s=draw(st.lists(st.tuples(texts, rates), max_size=3).map(tuple)),
        memory_bytes_per_s=draw(st.none() | rates),
        launch_s=draw(st.none() | rates),
        measured=draw(origins),
    )


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    chosen = draw(st.lists(names, unique=True, min_size=1, max_size=4))
    ends = st.sampled_from(chosen)
    links = st.builds(
        Link,
        source=ends,
        target=ends,
        peer_access=st.booleans(),
        bandwidth_bytes_per_s=st.none() | rates,
        latency_s=st.none() | numbers,
        pinned_bandwidth_bytes_per_s=st.none() | rates,
        measured=origins,
    )
    nodes = st.builds(
        NumaNode,
        index=st.integers(0, 9),
        cpus=st.lists(st.integers(0, 99), max_size=4).map(tuple),
        memory_bytes=st.integers(0, 2**50),
    )
    return Inventory(
        devices=tuple(draw(devices(name)) for name in chosen),
        links=tuple(draw(st.lists(links, max_size=3))),
        host=draw(texts),
        numa_nodes=tuple(draw(st.lists(nodes, max_size=2))),
    )


@given(inventories())
def test_an_inventory_survives_json_yaml_and_its_own_dict(inventory: Inventory) -> None:
    data = inventory.to_dict()
    for form in (data, json.loads(json.dumps(data)), yaml.safe_load(yaml.safe_dump(data))):
        assert Inventory.from_dict(form) == inventory
        assert resolve_devices(form, must_exist=False) == inventory


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json", "YAML"])
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "path"])
def test_a_saved_inventory_is_resolved_by_its_path(
    suffix: str, as_text: bool, machine: Inventory, tmp_path: Path
) -> None:
    path = tmp_path / f"lab.{suffix}"
    save_inventory(machine, path)
    assert resolve_devices(str(path) if as_text else path, discovered=machine) == machine


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_for_people_names_devices_with_sizes_and_leaves_out_what_is_known(
    tmp_path: Path, machine: Inventory
) -> None:
    path = write(
        tmp_path,
        """
        devices:
          - {name: "dla:0", kind: dla, memory: 1GiB, trainable: false}
          - {name: "cuda:1", memory: 8GiB}
          - {name: cpu, memory: null}
          - {kind: emulated, speed: 0.5, memory: 2GiB, threads: 1}
          - cpu@name=toy,speed=2
        links:
          - {source: "cuda:1", target: cpu, bandwidth: "12GB", latency_s: 1.0e-5}
          - {source: cpu, target: "cuda:1", bandwidth: "12GB/s", peer_access: true}
        """,
    )
    found = resolve_devices(path, discovered=machine)
    assert found.names == ("dla:0", "cuda:1", "cpu", "emulated:0", "toy")
    assert found.root.name == "cuda:1"
    assert found["cuda:1"] == replace(machine["cuda:1"], memory_bytes=8 * GIB)
    assert found["cpu"] == machine["cpu"]
    assert found["dla:0"] == DeviceSpec(name="dla:0", kind="dla", memory_bytes=GIB, torch_device=None, trainable=False)
    emulated = found["emulated:0"]
    assert (emulated.speed, emulated.memory_bytes, emulated.threads) == (0.5, 2 * GIB, 1)
    assert (emulated.torch_device, emulated.emulated) == ("cpu", True)
    assert found.links == (
        Link(source="cuda:1", target="cpu", bandwidth_bytes_per_s=12e9, latency_s=1e-5),
        Link(source="cpu", target="cuda:1", bandwidth_bytes_per_s=12e9, peer_access=True),
    )
    assert found.host == "lab"


@pytest.mark.parametrize("kind", ["dla", "fpga", "intel-npu", "openvino"])
def test_processors_that_only_run_exported_models_do_not_train_unless_told_otherwise(
    kind: str, machine: Inventory
) -> None:
    found = resolve_devices(["cpu", {"name": f"{kind}:0", "kind": kind, "memory": "1GiB"}], discovered=machine)
    target = found[f"{kind}:0"]
    assert (target.trainable, target.torch_device) == (False, None)
    assert not [link for link in found.links if f"{kind}:0" in (link.source, link.target)]


def test_a_file_may_be_a_bare_list_of_devices(tmp_path: Path, machine: Inventory) -> None:
    path = write(tmp_path, "- cuda:0\n- cpu@speed=1,mem=1GiB\n")
    assert resolve_devices(path, discovered=machine).names == ("cuda:0", "emulated:0")


def test_torchs_short_name_stands_for_the_only_device_of_its_kind(machine: Inventory) -> None:
    gpu = DeviceSpec(name="mps:0", kind="mps", memory_bytes=GIB, torch_device="mps:0")
    here = Inventory(devices=(gpu, machine["cpu"]))
    found = resolve_devices([{"name": "mps", "memory": "1GiB"}], discovered=here)
    assert (found.root.name, found.root.torch_device) == ("mps", "mps:0")


def test_hardware_that_is_elsewhere_can_be_described_for_planning(machine: Inventory) -> None:
    described = [{"name": f"cuda:{index}", "memory": "141GiB", "speed": 2} for index in range(8)]
    found = resolve_devices({"devices": described}, discovered=machine, must_exist=False)
    assert len(found) == 8
    assert found["cuda:0"].total_memory_bytes is None  # not that of the device of the same name here
    assert (found.host, found.numa_nodes) == ("", ())
    assert not found.link("cuda:0", "cuda:1").peer_access  # nor its links


def test_hardware_that_is_elsewhere_must_be_described_in_full(machine: Inventory) -> None:
    with pytest.raises(InventoryError, match="device 'cuda:0': its memory is not given, and it is not a device of"):
        resolve_devices([{"name": "cuda:0"}], discovered=machine, must_exist=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [cpu", "is damaged: "),
        ("just text", "has no list of devices; write devices: [{name: cpu, memory: 8GiB}]"),
        ("", "has no list of devices"),
        ("device: [cpu]", "has no list of devices"),
        ("devices: 3", "devices must be a list, got 3"),
        ("{devices: [cpu], lnks: []}", "has an unknown key 'lnks'; known are devices, links, host, numa_nodes"),
        ("devices: [{memory: 1GiB}]", "a device needs a name: {'memory': '1GiB'}; write for example name: 'cuda:0'"),
        ("devices: [{name: cpu, memry: 1GiB}]", "unknown key 'memry' of a device; known are name, kind, memory, "),
        ("devices: [{name: cpu, memry: 1GiB}]", "Did you mean 'memory'?"),
        ("devices: [{name: cpu, memory: 1, memory_bytes: 2}]", "a device gives 'memory_bytes' twice"),
        ("devices: [{name: cpu, memory: lots}]", "a device, memory: 'lots' is not a size"),
        ("devices: [{name: cpu, memory: [1]}]", "a device, memory: must be a size such as '16GiB', got [1]"),
        ("devices: [{name: cpu, memory: 0}]", "device 'cpu': memory_bytes must be > 0, got 0"),
        ("devices: [{name: cpu, speed: fast}]", "a device, speed: must be a number, got 'fast'"),
        ("devices: [{name: cpu, speed: true}]", "a device, speed: must be a number, got True"),
        ("devices: [{name: cpu, threads: 1.5}]", "a device, threads: must be a whole number, got 1.5"),
        ("devices: [{name: cpu, trainable: maybe}]", "a device, trainable: must be true or false, got 'maybe'"),
        ("devices: [{name: cpu, dtypes: float32}]", "a device, dtypes: must be a list, got 'float32'"),
        ("devices: [{name: cpu, flops_per_s: 1e12}]", "must be rates by dtype such as {float32: 2e13}, got"),
        ("devices: [{name: cpu, flops_per_s: [float32, 1]}]", "must be pairs of a dtype and a rate, got"),
        ("devices: [{name: cpu, flops_per_s: {float32: much}}]", "flops_per_s: must be a number, got 'much'"),
        (
            "devices: [{name: cpu, flops_per_s: {float32: 0}}]",
            "device 'cpu': flops_per_s of float32 must be a finite number > 0, got 0.0",
        ),
        (
            "devices: [{name: cpu, measured: guessed}]",
            "device 'cpu': measured must be one of '', 'measured', 'low confidence', 'data sheet', got 'guessed'",
        ),
        ("devices: [{name: 7}]", "a device, name: must be a text, got 7"),
        (
            "devices: [{name: mine, kind: cuda, memory: 1GiB}]",
            "device 'mine' of kind 'cuda': torch's name for it is missing; write for example torch_device: 'cuda:0', "
            "or trainable: false if torch cannot train on it",
        ),
        (
            "devices: [{name: 'cuda:5', memory: 1GiB}]",
            "device 'cuda:5' is not available. Available: cuda:0 (78.0 GiB), ",
        ),
        ("devices: [{name: 'cuda:5'}]", "pass must_exist=False; to train, use the devices listed."),
        ("{devices: [cpu], links: [{source: cpu}]}", "a link needs a target: {'source': 'cpu'}"),
        ("{devices: [cpu], links: [cpu]}", "a link is written as keys and values, got 'cpu'"),
        (
            "{devices: [cpu], links: [{source: cpu, target: gpu}]}",
            "has a link that ends at 'gpu'; its devices are cpu",
        ),
        (
            "{devices: [cpu], links: [{source: cpu, target: cpu, bandwith: 1GB}]}",
            "unknown key 'bandwith' of a link; known are source, target, peer_access, bandwidth, "
            "bandwidth_bytes_per_s, latency_s, pinned_bandwidth, pinned_bandwidth_bytes_per_s, measured. "
            "Did you mean 'bandwidth'?",
        ),
        (
            "{devices: [cpu], links: [{source: cpu, target: cpu, bandwidth: fast}]}",
            "a link, bandwidth: 'fast' is not a size",
        ),
        ("{devices: [cpu], numa_nodes: [{index: 0}]}", "a NUMA node needs 'cpus': {'index': 0}"),
    ],
)
def test_a_mistake_in_a_file_is_named(text: str, message: str, tmp_path: Path, machine: Inventory) -> None:
    with pytest.raises(InventoryError) as caught:
        resolve_devices(write(tmp_path, text), discovered=machine)
    assert message in str(caught.value)


def test_damaged_json_is_named(tmp_path: Path, machine: Inventory) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(InventoryError, match=r"the inventory file '.*mine\.json' is damaged"):
        resolve_devices(path, discovered=machine)


@pytest.mark.parametrize("request_", ["missing.yaml", Path("missing.json")], ids=repr)
def test_a_missing_file_is_named(request_: Any, machine: Inventory) -> None:
    with pytest.raises(InventoryError, match=r"the inventory file 'missing\.\w+' cannot be read: .*No such file"):
        resolve_devices(request_, discovered=machine)


def test_a_file_of_another_type_is_refused_for_reading_and_writing(machine: Inventory, tmp_path: Path) -> None:
    refusal = r"is no inventory file; its name must end in \.yaml, \.yml, \.json"
    with pytest.raises(InventoryError, match=refusal):
        resolve_devices(Path("devices.txt"), discovered=machine)
    with pytest.raises(InventoryError, match=refusal):
        save_inventory(machine, tmp_path / "devices.txt")


@pytest.mark.parametrize(
    ("numbers", "refusal"),
    [
        ({"bandwidth_bytes_per_s": 0}, "bandwidth_bytes_per_s must be a finite number > 0, got 0"),
        ({"bandwidth_bytes_per_s": float("nan")}, "bandwidth_bytes_per_s must be a finite number > 0, got nan"),
        ({"pinned_bandwidth_bytes_per_s": -1.0}, "pinned_bandwidth_bytes_per_s must be a finite number > 0, got -1.0"),
        ({"latency_s": -1e-6}, "latency_s must be a finite number >= 0, got -1e-06"),
        ({"latency_s": float("inf")}, "latency_s must be a finite number >= 0, got inf"),
    ],
    ids=str,
)
def test_a_link_that_cannot_be_is_refused(numbers: dict[str, float], refusal: str) -> None:
    with pytest.raises(InventoryError, match=f"link 'a' to 'b': {refusal}"):
        Link(source="a", target="b", **numbers)
