"""Runs of the Trainer that compare the strategy with one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.testing.accelerator import EmulatedAccelerator

MakeTrainer = Callable[..., pl.Trainer]


@pytest.fixture(autouse=True)
def _no_limits(accelerator: EmulatedAccelerator) -> Iterator[None]:
    yield
    accelerator.reset()


@pytest.fixture
def hetero(quiet: dict[str, Any], accelerator: EmulatedAccelerator) -> MakeTrainer:
    """A Trainer with this package's strategy on the CPU and two accelerators, a border at every unit."""
    from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

    def make(
        devices: Any = None, placement: Any = "round_robin", strategy: dict[str, Any] | None = None, **options: Any
    ) -> pl.Trainer:
        devices = devices or ["cpu", *accelerator.devices[:2]]
        chosen = HeteroStrategy(devices=devices, placement=placement, verbose=False, **(strategy or {}))
        return pl.Trainer(**{**quiet, "strategy": chosen, "max_epochs": 2, **options})

    return make
