"""Discovery over device modules with the functions of `torch.cuda` and others, and on this very machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch

from lightning_hetero.devices import discover

GIB = 1024**3


@dataclass(frozen=True)
class Card:
    """The facts of one device, under the names that torch gives them."""

    name: str = "Example"
    total_gib: int = 24
    free_gib: int = 20
    reserved_gib: int = 0
    multi_processor_count: int = 100
    capability: tuple[int, int] = (9, 0)
    has_fp64: bool = True

    @property
    def total_memory(self) -> int:
        return self.total_gib * GIB


def device_module(*cards: Card, peers: bool = False) -> SimpleNamespace:
    """A device module as torch offers them, over these cards."""
    return SimpleNamespace(
        is_available=lambda: bool(cards),
        device_count=lambda: len(cards),
        get_device_properties=lambda index: cards[index],
        get_device_capability=lambda index: cards[index].capability,
        mem_get_info=lambda index: (cards[index].free_gib * GIB, cards[index].total_memory),
        memory_reserved=lambda index: cards[index].reserved_gib * GIB,
        can_device_access_peer=lambda source, target: peers,
    )


def refuse(*arguments: object) -> int:
    raise RuntimeError("driver and library do not match")


def test_accelerators_come_first_and_the_cpu_last() -> None:
    found = discover(modules={"xpu": device_module(Card()), "cuda": device_module(Card(), Card())})
    assert found.names == ("cuda:0", "cuda:1", "xpu:0", "cpu")
    assert found.root.name == "cuda:0"


def test_a_backend_that_nobody_knows_ranks_between_cards_and_integrated_graphics() -> None:
    kinds = ("mps", "xpu", "newchip", "npu", "cuda")
    found = discover(modules={kind: device_module(Card()) for kind in kinds})
    assert found.names == ("cuda:0", "npu:0", "newchip:0", "xpu:0", "mps:0", "cpu")


def test_within_a_kind_the_larger_processor_leads_and_then_the_larger_memory() -> None:
    small, large = Card(multi_processor_count=20), Card(multi_processor_count=132)
    roomy = Card(multi_processor_count=132, total_gib=80)
    found = discover(modules={"cuda": device_module(small, large, roomy, large)})
    assert found.names == ("cuda:2", "cuda:1", "cuda:3", "cuda:0", "cpu")


def test_memory_is_the_total_without_what_others_use_and_a_reserve() -> None:
    others_use_4 = Card(total_gib=24, free_gib=14, reserved_gib=6)
    device = discover(modules={"cuda": device_module(others_use_4)})["cuda:0"]
    assert device.total_memory_bytes == 24 * GIB
    assert device.memory_bytes == 20 * GIB - GIB // 2


def test_the_reserve_of_a_small_device_is_a_twentieth() -> None:
    device = discover(modules={"cuda": device_module(Card(total_gib=2, free_gib=2))})["cuda:0"]
    assert device.memory_bytes == 2 * GIB - 2 * GIB // 20


def test_a_backend_that_tells_only_the_total_is_taken_to_be_free() -> None:
    module = device_module(Card(total_gib=100))
    module.mem_get_info = refuse
    assert discover(modules={"xpu": module})["xpu:0"].memory_bytes == 100 * GIB - GIB // 2


def test_apples_gpu_has_the_memory_that_metal_recommends() -> None:
    module = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, recommended_max_memory=lambda: 10 * GIB)
    device = discover(modules={"mps": module})["mps:0"]
    assert (device.total_memory_bytes, device.memory_bytes) == (10 * GIB, 10 * GIB - GIB // 2)
    assert device.label == "Apple GPU"
    assert "float64" not in device.dtypes


def test_a_device_that_does_not_tell_its_memory_gets_one_gib_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    with caplog.at_level(logging.WARNING):
        device = discover(modules={"mtia": module})["mtia:0"]
    assert (device.total_memory_bytes, device.memory_bytes) == (None, GIB)
    assert "device mtia:0 does not tell its memory; 1.00 GiB is assumed" in caplog.text
    assert "memory={'mtia:0': '16GiB'}" in caplog.text


@pytest.mark.parametrize("question", ["is_available", "device_count"])
def test_a_broken_backend_is_left_out_with_a_warning_that_names_it(
    question: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = device_module(Card())
    setattr(broken, question, refuse)
    with caplog.at_level(logging.WARNING):
        found = discover(modules={"npu": broken, "cuda": device_module(Card())})
    assert found.names == ("cuda:0", "cpu")
    assert "device backend 'npu' is broken and left out: RuntimeError: driver and library" in caplog.text


def test_a_sick_card_among_healthy_ones_is_left_out_with_a_warning_that_names_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = device_module(Card(), Card())
    module.get_device_properties = lambda index: refuse() if index == 0 else Card()
    with caplog.at_level(logging.WARNING):
        found = discover(modules={"cuda": module})
    assert found.names == ("cuda:1", "cpu")
    assert "device 'cuda:0' is broken and left out" in caplog.text


def test_a_backend_without_devices_is_left_out_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert discover(modules={"cuda": device_module()}).names == ("cpu",)
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        ((5, 2), ("float64", "float32")),
        ((7, 5), ("float64", "float32", "float16")),
        ((8, 0), ("float64", "float32", "float16", "bfloat16")),
    ],
)
def test_the_dtypes_of_a_cuda_device_follow_from_its_capability(
    capability: tuple[int, int], dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    found = discover(modules={"cuda": device_module(Card(capability=capability))})
    assert found["cuda:0"].dtypes == dtypes


def test_amd_devices_are_cuda_to_torch_and_say_so_in_their_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    device = discover(modules={"cuda": device_module(Card(name="AMD Example"))})["cuda:0"]
    assert device.label == "AMD Example (ROCm 6.4)"
    assert "bfloat16" in device.dtypes


def test_an_intel_device_computes_in_float64_only_if_its_hardware_does() -> None:
    found = discover(modules={"xpu": device_module(Card(has_fp64=True), Card(has_fp64=False))})
    assert "float64" in found["xpu:0"].dtypes
    assert "float64" not in found["xpu:1"].dtypes


def test_the_dtypes_of_an_unknown_backend_are_unknown() -> None:
    assert discover(modules={"newchip": device_module(Card())})["newchip:0"].dtypes == ()


def test_links_join_all_pairs_and_know_peer_access_but_no_bandwidth() -> None:
    modules = {"cuda": device_module(Card(), Card(), peers=True), "xpu": device_module(Card(), Card())}
    found = discover(modules=modules)
    direct = {(link.source, link.target) for link in found.links if link.peer_access}
    assert len(found.links) == 5 * 4
    assert ("cuda:0", "cuda:1") in direct
    assert ("cuda:0", "cpu") in direct
    assert ("cpu", "xpu:1") in direct
    assert ("cuda:0", "xpu:0") not in direct
    assert ("xpu:0", "xpu:1") not in direct
    assert {link.bandwidth_bytes_per_s for link in found.links} == {None}


def test_a_backend_that_cannot_tell_of_peer_access_has_none() -> None:
    module = device_module(Card(), Card())
    module.can_device_access_peer = refuse
    assert not discover(modules={"cuda": module}).link("cuda:0", "cuda:1").peer_access


def test_the_host_comes_from_the_files_of_the_given_root(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 8388608 kB\n")
    found = discover(modules={}, root=tmp_path)
    assert found["cpu"].total_memory_bytes == 8 * GIB
    assert found.numa_nodes == ()


def test_this_machine_has_a_cpu_with_memory_and_a_name() -> None:
    cpu = discover()["cpu"]
    assert 0 < cpu.memory_bytes <= (cpu.total_memory_bytes or 0)
    assert cpu.label


def test_neither_import_nor_discovery_initialises_cuda_where_there_is_none(
    run_python: Callable[..., CompletedProcess[str]],
) -> None:
    code = (
        "import sys, lightning_hetero.devices as devices\n"
        "assert 'torch' not in sys.modules, 'the import loads torch'\n"
        "devices.discover(modules={})\n"
        "assert 'torch' not in sys.modules, 'asking for the CPU alone loads torch'\n"
        "devices.resolve_devices('cpu@speed=1,mem=1GiB,cpu')\n"
        "assert 'torch' not in sys.modules, 'emulated devices load torch'\n"
        "devices.discover()\n"
        "import torch\n"
        "assert torch.cuda.is_initialized() == torch.cuda.is_available()\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
