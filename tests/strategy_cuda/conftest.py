"""A GPU and the CPU together. Where there is no CUDA device, the emulated accelerator plays the GPU.

So every test with the fixture `gpu` runs on `cuda:0`, with the marker `cuda`, in all of its cases; and in one case on
`dev:0`, which shows on any machine that the test itself is right. Only what a run leaves behind is asked in every case
on both, and torchrun is left to `cuda:0`: tests/processes starts it on any machine. What only the hardware has
(streams, another order of sums, cuDNN) shows on the first one. For the bounds, see `test_cuda.py`; SGD makes no step of
the learning rate out of a gradient of rounding, as Adam does, so results with SGD are compared more closely.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero import HeteroStrategy

MakeTrainer = Callable[..., Any]


@dataclass(frozen=True)
class Gpu:
    """The GPU of a test.

    Attributes:
        name: Of the device: "cuda:0", or "dev:0" where it is emulated.
    """

    name: str

    @property
    def kind(self) -> str:
        """Its device type."""
        return torch.device(self.name).type

    @property
    def is_real(self) -> bool:
        return self.kind == "cuda"

    @property
    def module(self) -> Any:
        """`torch.cuda`, or what is in its place."""
        return torch.get_device_module(self.kind)

    def orders(self) -> list[list[str]]:
        """Both devices, each of them as the root once."""
        return [[self.name, "cpu"], ["cpu", self.name]]

    def used_bytes(self, with_workspaces: bool = False) -> int:
        """What tensors take on it, once nobody holds them by a cycle.

        Args:
            with_workspaces: Whether those of cuBLAS count, which belong to the process: one for each thread and stream.
        """
        gc.collect()
        self.module.synchronize(0)
        if self.is_real and not with_workspaces:
            torch._C._cuda_clearCublasWorkspaces()
        self.module.empty_cache()
        return int(self.module.memory_allocated(0))

    def forget_peak(self) -> None:
        self.module.reset_peak_memory_stats(0)

    def peak_bytes(self) -> int:
        """The most that tensors took at once since `forget_peak`."""
        self.module.synchronize(0)
        return int(self.module.max_memory_allocated(0))


@pytest.fixture(params=[pytest.param("cuda:0", marks=pytest.mark.cuda), "dev:0"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """The GPU: a real one, or a device of the emulated accelerator."""
    if request.param == "cuda:0":
        yield Gpu(request.param)
        return
    accelerator = request.getfixturevalue("accelerator")
    accelerator.reset()
    yield Gpu(request.param)
    accelerator.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, of the emulated GPU, what does not help to show that a test is right."""
    the_case = {"test_races": "-many]", "test_the_peak_is": "4-"}
    shown: set[str] = set()

    def helps(item: pytest.Item) -> bool:
        if "cpu-first" in item.nodeid or "test_processes" in item.nodeid:
            return False
        if "test_nothing_left" in item.nodeid:
            return True
        test = item.nodeid.partition("[")[0]
        is_first = test not in shown and all(case in item.nodeid for name, case in the_case.items() if name in test)
        if is_first:
            shown.add(test)
        return is_first

    emulated = [item for item in items if "strategy_cuda" in item.nodeid and "dev:0" in item.nodeid]
    out = {item for item in emulated if not helps(item)}
    if out:
        config.hook.pytest_deselected(items=[item for item in emulated if item in out])
        items[:] = [item for item in items if item not in out]


@pytest.fixture(params=["gpu-first", "cpu-first"])
def places(request: pytest.FixtureRequest, gpu: Gpu) -> list[str]:
    """Both devices; the first is the root."""
    return gpu.orders()[request.param == "cpu-first"]


@pytest.fixture
def over(quiet: dict[str, Any]) -> MakeTrainer:
    """`over(places, strategy={...}, **options)`: a Trainer over these devices, with a border at every unit."""

    def make(places: Any, *, strategy: dict[str, Any] | None = None, **options: Any) -> Any:
        chosen = {"placement": "round_robin", "verbose": False, "hang_timeout_s": 60.0, **(strategy or {})}
        chosen = HeteroStrategy(devices=places, **chosen)
        return pl.Trainer(**{**quiet, "max_epochs": 2, "strategy": chosen, **options})

    return make


@pytest.fixture
def alone(quiet: dict[str, Any]) -> MakeTrainer:
    """`alone(where, **options)`: plain Lightning on one device. An emulated GPU has the CPU's numbers."""

    def make(where: Gpu | str, **options: Any) -> Any:
        accelerator = "gpu" if isinstance(where, Gpu) and where.is_real else "cpu"
        return pl.Trainer(**{**quiet, "max_epochs": 2, "accelerator": accelerator, "devices": 1, **options})

    return make
