"""The same training loop by plain Fabric on one device and by ours over three, and nothing of it left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from lightning.fabric import Fabric

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero import FabricStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator

EMULATED = "cpu@speed=2,cpu@speed=1,cpu@speed=1"

MakeFabric = Callable[..., Fabric]


@dataclass(frozen=True)
class Devices:
    """Three devices that a test runs on.

    Attributes:
        names: For `FabricStrategy(devices=)`; the root is first.
        micro_batches: What it gets unless the test says otherwise.
    """

    names: Any
    micro_batches: int | None


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Fabric never says that a run is over: what a model holds goes with the model, in a collection of garbage.

    Autograd's thread of a device may be on its way out of the last backward, which it holds as long: once may be too
    early.
    """
    yield
    end_s = time.monotonic() + 5.0
    gc.collect()
    while any("hetero" in thread.name for thread in threading.enumerate()) and time.monotonic() < end_s:
        time.sleep(0.01)
        gc.collect()


@pytest.fixture(params=["emulated", "accelerator", "accelerator as root"])
def devices(request: pytest.FixtureRequest) -> Iterator[Devices]:
    """Three devices: the CPU as all of them, in micro-batches, or the CPU and two accelerators, either as the root."""
    if request.param == "emulated":
        yield Devices(EMULATED, micro_batches=2)
        return
    accelerator: EmulatedAccelerator = request.getfixturevalue("accelerator")
    first, second, *_ = accelerator.devices
    is_root = request.param == "accelerator as root"
    yield Devices([first, "cpu", second] if is_root else ["cpu", first, second], 2 if is_root else None)
    accelerator.reset()


@pytest.fixture
def alone() -> MakeFabric:
    """Makes plain Fabrics on the CPU."""
    return lambda **options: Fabric(**{"accelerator": "cpu", "devices": 1, **options})


@pytest.fixture
def hostile(devices: Devices) -> MakeFabric:
    """`hostile(strategy={...}, **options)`: a Fabric of ours with a border at every unit."""

    def make(*, strategy: dict[str, Any] | None = None, **options: Any) -> Fabric:
        chosen = {
            "devices": devices.names,
            "placement": "round_robin",
            "micro_batches": devices.micro_batches,
            "hang_timeout_s": 60.0,
            "verbose": False,
            **(strategy or {}),
        }
        return Fabric(strategy=FabricStrategy(**chosen), **options)

    return make
