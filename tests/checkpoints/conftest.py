"""Checkpoint files, and Trainers over devices that get in the way."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.strategy.lightning_pytorch import HeteroCheckpointIO, HeteroStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator

sys.path.insert(0, str(Path(__file__).parents[1] / "processes"))  # for what starts processes

MakeTrainer = Callable[..., pl.Trainer]


@pytest.fixture
def files() -> HeteroCheckpointIO:
    """What the strategy reads and writes checkpoints with."""
    return HeteroCheckpointIO()


@pytest.fixture
def state() -> dict[str, Any]:
    """As much of a checkpoint as files care about."""
    numbers = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    return {"state_dict": {"weight": numbers, "tied": numbers}, "epoch": 3, "loops": {"name": "fit", "done": None}}


@pytest.fixture
def names() -> Callable[[Path], set[str]]:
    """All that stands in a folder."""
    return lambda folder: {path.name for path in folder.iterdir()}


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes a file of this process may have: writing more is an error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def hetero(quiet: dict[str, Any], accelerator: EmulatedAccelerator) -> Iterator[MakeTrainer]:
    """A Trainer with the hostile policy: the first unit off the root, and a border at every unit."""

    def make(strategy: dict[str, Any] | None = None, **options: Any) -> pl.Trainer:
        chosen = {"devices": ["cpu", *accelerator.devices[:2]], "placement": "round_robin", **(strategy or {})}
        return pl.Trainer(**{**quiet, "max_epochs": 1, "strategy": HeteroStrategy(verbose=False, **chosen), **options})

    yield make
    accelerator.reset()
