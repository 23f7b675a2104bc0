"""Models spread over devices without Lightning, and closed again when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from torch import nn

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero import ModelParallel, ModelParallelConfig
from lightning_hetero.testing.accelerator import EmulatedAccelerator

Spread = Callable[..., ModelParallel]


@pytest.fixture
def spread(accelerator: EmulatedAccelerator) -> Iterator[Spread]:
    """`spread(model, device_ids=[0, "cpu"])`, a `ModelParallel` with these options; the accelerator is emulated."""
    with ExitStack() as stack:

        def make(model: nn.Module, **options: Any) -> ModelParallel:
            return stack.enter_context(ModelParallel(ModelParallelConfig(model=model, **options)))

        yield make
