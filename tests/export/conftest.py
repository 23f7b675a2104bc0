"""Models on their way out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.export import HeteroRuntime, Manifest, export

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CI", "true")  # OpenVINO reports its import to its makers, with a thread that stays, but not in a CI
    with suppress(ImportError):  # the tests that need it fail without it, and no others
        import openvino  # noqa: F401


@pytest.fixture
def take_away(tmp_path: Path) -> Any:
    """Exports a module into a new directory, and opens it: `take_away(module, example, **options of export)`."""
    opened: list[HeteroRuntime] = []

    def make(module: nn.Module, example: Any, **options: Any) -> tuple[Manifest, HeteroRuntime]:
        manifest = export(module, tmp_path / f"exported{len(opened)}", example_inputs=example, **options)
        opened.append(HeteroRuntime(tmp_path / f"exported{len(opened)}"))
        return manifest, opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
