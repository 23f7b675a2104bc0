"""What the C++ backend does beyond the Python one."""

from __future__ import annotations

import pytest

from lightning_hetero.testing import EmulatedAccelerator


@pytest.fixture(autouse=True)
def _needs_cpp(accelerator: EmulatedAccelerator) -> None:
    if accelerator.kind != "cpp":
        pytest.skip(
            "the C++ backend needs a compiler, and this machine has none; see lightning_hetero.testing.cpp_build"
        )
