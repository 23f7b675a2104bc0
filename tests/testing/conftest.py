"""Devices of the emulated accelerator without limits, and models that stand on them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from lightning_hetero.testing import EmulatedAccelerator, cpp_build


@pytest.fixture(autouse=True)
def _exact_counts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test begins with counters at zero, leaves no limit behind, and frees nothing of the tests before it."""
    accelerator = request.getfixturevalue("accelerator") if "accelerator" in request.fixturenames else None
    gc.disable()
    if accelerator is not None:
        accelerator.reset()
    yield
    if accelerator is not None:
        accelerator.reset()
    gc.enable()


@pytest.fixture(params=[0, 1])
def index(request: pytest.FixtureRequest) -> int:
    """Which of the two devices."""
    return int(request.param)


@pytest.fixture
def device(accelerator: EmulatedAccelerator, index: int) -> str:
    """One device after the other, because much works on the first only by luck."""
    return accelerator.devices[index]


@pytest.fixture
def compiler() -> str:
    """The compiler of this machine, which has all that a build needs; skips the test where it has not."""
    missing = cpp_build.what_is_missing()
    if missing:
        pytest.skip(f"the C++ backend cannot be built here: this machine lacks {missing}")
    return os.environ.get("CXX", "c++")
