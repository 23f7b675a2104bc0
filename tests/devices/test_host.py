"""The CPU as a device, from fake `/proc` and `/sys` trees and on systems that have neither."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.devices import NumaNode
from lightning_hetero.devices.host import cpu_device, cpu_label, host_memory, numa_nodes, parse_cpu_list

Tree = Callable[[dict[str, str]], Path]
GIB = 1024**3
MIB = 1024**2
KIB_IN_GIB = 1024**2


def meminfo(total_gib: int, available_gib: int) -> dict[str, str]:
    return {
        "proc/meminfo": f"MemTotal: {total_gib * KIB_IN_GIB} kB\nMemFree: 1 kB\n"
        f"MemAvailable: {available_gib * KIB_IN_GIB} kB\nHugePages_Total: 0\n"
    }


def cgroup(limit_gib: int, used_gib: int) -> dict[str, str]:
    return {
        "proc/self/cgroup": "0::/job\n",
        "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/job/memory.max": str(limit_gib * GIB),
        "sys/fs/cgroup/job/memory.current": str(used_gib * GIB),
    }


def test_what_others_use_and_a_reserve_of_one_gib_are_not_usable(tree: Tree) -> None:
    memory = host_memory(tree(meminfo(64, 40)))
    assert (memory.total_bytes, memory.usable_bytes) == (64 * GIB, 39 * GIB)


def test_what_this_process_holds_already_is_usable(tree: Tree) -> None:
    own = {"proc/self/status": f"Name: python\nRssAnon: {10 * KIB_IN_GIB} kB\n"}
    assert host_memory(tree(meminfo(64, 40) | own)).usable_bytes == 49 * GIB


def test_the_reserve_of_a_small_machine_is_a_twentieth(tree: Tree) -> None:
    assert host_memory(tree(meminfo(4, 4))).usable_bytes == 4 * GIB - 4 * GIB // 20


def test_the_limit_of_the_control_group_caps_total_and_rest(tree: Tree) -> None:
    memory = host_memory(tree(meminfo(512, 400) | cgroup(32, 12)))
    assert (memory.total_bytes, memory.usable_bytes) == (32 * GIB, 19 * GIB)


def test_a_limit_above_the_physical_memory_changes_nothing(tree: Tree) -> None:
    memory = host_memory(tree(meminfo(64, 40) | cgroup(512, 0)))
    assert (memory.total_bytes, memory.usable_bytes) == (64 * GIB, 39 * GIB)


def test_a_full_machine_still_makes_a_device(tree: Tree) -> None:
    assert cpu_device(tree(meminfo(64, 0))).memory_bytes == 1


def test_an_old_kernel_without_memavailable_counts_free_and_cached(tree: Tree) -> None:
    text = f"MemTotal: {64 * KIB_IN_GIB} kB\nMemFree: {8 * KIB_IN_GIB} kB\nCached: {4 * KIB_IN_GIB} kB\n"
    assert host_memory(tree({"proc/meminfo": text})).usable_bytes == 11 * GIB


def test_a_system_without_proc_gives_three_quarters_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "windll", None, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 16 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.usable_bytes) == (16 * GIB, 12 * GIB - 16 * GIB // 20)


def test_windows_is_asked_for_total_and_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def global_memory_status(reference: Any) -> int:
        status = reference._obj
        assert status.length == 64  # Windows refuses a structure of another size
        status.total_bytes, status.free_bytes = 32 * GIB, 20 * GIB
        return 1

    kernel32 = SimpleNamespace(GlobalMemoryStatusEx=global_memory_status)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.usable_bytes) == (32 * GIB, 19 * GIB)


def test_a_system_that_tells_nothing_is_taken_for_a_small_one_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sysconf(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(ctypes, "windll", None, raising=False)
    monkeypatch.setattr(os, "sysconf", sysconf)
    with caplog.at_level(logging.WARNING):
        assert host_memory(tmp_path).total_bytes == 4 * GIB
    assert "does not tell its memory; 4 GiB are assumed" in caplog.text


def test_the_cpu_is_a_trainable_device_of_every_float_dtype(tree: Tree) -> None:
    cpu = cpu_device(tree(meminfo(64, 40) | {"proc/cpuinfo": "model name : Example 9000\n"}))
    assert (cpu.name, cpu.kind, cpu.torch_device, cpu.label) == ("cpu", "cpu", "cpu", "Example 9000")
    assert cpu.trainable
    assert cpu.dtypes == ("float64", "float32", "float16", "bfloat16")


def test_the_product_name_without_cpuinfo_is_what_python_knows(tmp_path: Path) -> None:
    assert cpu_label(tmp_path)


def test_numa_nodes_are_listed_by_index_with_cpus_and_memory(tree: Tree) -> None:
    folder = "sys/devices/system/node"
    root = tree(
        {
            f"{folder}/node10/cpulist": "\n",
            f"{folder}/node10/meminfo": "Node 10 MemTotal: 1024 kB\n",
            f"{folder}/node2/cpulist": "0-2,8\n",
            f"{folder}/node2/meminfo": "Node 2 MemTotal: 2048 kB\nNode 2 MemFree: 1 kB\n",
            f"{folder}/online": "2,10\n",
        }
    )
    assert numa_nodes(root) == (
        NumaNode(index=2, cpus=(0, 1, 2, 8), memory_bytes=2 * MIB),
        NumaNode(index=10, cpus=(), memory_bytes=MIB),
    )


def test_a_system_without_numa_has_no_nodes(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path) == ()


@given(st.sets(st.integers(0, 300)))
def test_every_set_of_cpus_is_read_as_linux_writes_it(cpus: set[int]) -> None:
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in parts)
    assert parse_cpu_list(f"{text}\n") == tuple(sorted(cpus))
