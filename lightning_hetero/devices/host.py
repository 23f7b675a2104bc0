"""The CPU as a device: its memory, its NUMA nodes and its product name, on any operating system."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path
from typing import Any

from lightning_hetero.devices.cgroup import cgroup_memory
from lightning_hetero.devices.dtypes import float_dtypes
from lightning_hetero.devices.memory import Memory, usable_memory
from lightning_hetero.devices.spec import DeviceSpec, NumaNode

log = logging.getLogger(__name__)

_GIB = 1024**3


def cpu_device(root: Path = Path("/")) -> DeviceSpec:
    """The CPU with the memory that a plan may use.

    Args:
        root: Where `/proc` and `/sys` are looked up.
    """
    memory = host_memory(root)
    return DeviceSpec(
        name="cpu",
        kind="cpu",
        memory_bytes=memory.usable_bytes,
        torch_device="cpu",
        total_memory_bytes=memory.total_bytes,
        label=cpu_label(root),
        dtypes=float_dtypes("cpu"),
    )


def host_memory(root: Path = Path("/")) -> Memory:
    """Physical memory, or the limit of the control group where that is less; reserve: 1 GiB.

    Args:
        root: Where `/proc` and the control groups are looked up.
    """
    meminfo = _table(root / "proc/meminfo")
    total_bytes = meminfo.get("MemTotal", 0)
    # Before Linux 3.14 there was no MemAvailable.
    free_bytes = meminfo.get("MemAvailable", meminfo.get("MemFree", 0) + meminfo.get("Cached", 0))
    if not total_bytes:
        total_bytes, free_bytes = _memory_without_proc()
    own_bytes = _table(root / "proc/self/status").get("RssAnon", 0)
    group = cgroup_memory(root)
    if group is not None and group.limit_bytes > 0:
        total_bytes = min(total_bytes, group.limit_bytes)
        free_bytes = min(free_bytes, group.available_bytes)
    return usable_memory(total_bytes=total_bytes, free_bytes=free_bytes, own_bytes=own_bytes, reserve_bytes=_GIB)


def numa_nodes(root: Path = Path("/")) -> tuple[NumaNode, ...]:
    """The NUMA nodes from `/sys/devices/system/node`, by index; empty where the system tells none."""
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        index = int(folder.name.removeprefix("node"))
        sizes = _table(folder / "meminfo", skip=f"Node {index} ")
        nodes.append(
            NumaNode(
                index=index,
                cpus=parse_cpu_list(_text(folder / "cpulist")),
                memory_bytes=sizes.get("MemTotal", 0),
            )
        )
    return tuple(sorted(nodes, key=lambda node: node.index))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Read Linux's way to write a set of CPUs.

    Example:
        >>> parse_cpu_list("0-3,8,10-11")
        (0, 1, 2, 3, 8, 10, 11)
    """
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def cpu_label(root: Path = Path("/")) -> str:
    """The product name, for people."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "CPU"


def _memory_without_proc() -> tuple[int, int]:
    """(total, free) bytes where there is no `/proc`: macOS, Windows."""
    windows = getattr(ctypes, "windll", None)
    if windows is not None:
        return _windows_memory(windows.kernel32)
    try:
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total_bytes = 0
    if total_bytes <= 0:
        total_bytes = 4 * _GIB
        log.warning("this system does not tell its memory; 4 GiB are assumed. Say what it has: memory={'cpu': ...}")
    # macOS does not tell what is free in an inexpensive way; leave a quarter to the others.
    return total_bytes, total_bytes * 3 // 4


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total_bytes", ctypes.c_uint64),
        ("free_bytes", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _windows_memory(kernel32: Any) -> tuple[int, int]:
    status = _MemoryStatus()
    status.length = ctypes.sizeof(status)
    kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total_bytes or 4 * _GIB, status.free_bytes or 3 * _GIB


def _table(path: Path, skip: str = "") -> dict[str, int]:
    """Bytes by name from lines such as "MemTotal:  16 kB", each without the prefix `skip`."""
    sizes: dict[str, int] = {}
    for line in _text(path).splitlines():
        key, _, value = line.removeprefix(skip).partition(":")
        words = value.split()
        if len(words) == 2 and words[0].isdecimal() and words[1] == "kB":
            sizes[key] = int(words[0]) * 1024
    return sizes


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
