"""A machine that nobody needs to own, and fake `/proc` and `/sys` trees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hetero.devices import DeviceSpec, Inventory, Link, NumaNode

GIB = 1024**3


@pytest.fixture
def machine() -> Inventory:
    """Two unequal CUDA devices with a measured link, and a CPU."""

    def device(name: str, kind: str, memory_gib: int, total_gib: int) -> DeviceSpec:
        return DeviceSpec(
            name=name,
            kind=kind,
            memory_bytes=memory_gib * GIB,
            torch_device=name,
            total_memory_bytes=total_gib * GIB,
            label=f"a {kind} processor",
            dtypes=("float64", "float32"),
        )

    return Inventory(
        devices=(device("cuda:0", "cuda", 78, 80), device("cuda:1", "cuda", 10, 24), device("cpu", "cpu", 60, 64)),
        links=(
            Link(source="cuda:0", target="cuda:1", peer_access=True, bandwidth_bytes_per_s=5e10, latency_s=1e-5),
            Link(source="cuda:1", target="cuda:0", peer_access=True),
        ),
        host="lab",
        numa_nodes=(NumaNode(index=0, cpus=(0, 1), memory_bytes=64 * GIB),),
    )


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes files by path below a fake root and returns the root."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            file = tmp_path / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return tmp_path

    return write
