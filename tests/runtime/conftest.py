"""Places models of the tests over real devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, PlacementPolicy, Problem, make_plan
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import PlacedModel
from lightning_hetero.testing.accelerator import EmulatedAccelerator

Place = Callable[..., PlacedModel]


@contextmanager
def _placed(model: nn.Module, policy: PlacementPolicy, devices: str) -> Iterator[PlacedModel]:
    problem = Problem(graph=find_units(model), inventory=resolve_devices(devices))
    placed = PlacedModel(model, make_plan(policy, problem))
    placed.place()
    mode = placed.reconciler()
    if mode is not None:
        activate(mode)
    try:
        yield placed
    finally:
        if mode is not None:
            deactivate(mode)
        placed.release(torch.device("cpu"))


@pytest.fixture
def place(accelerator: EmulatedAccelerator) -> Iterator[Place]:
    """`place(model, {"name": "dev:0", "": "cpu"})` places a model until the test ends; the root is the CPU."""
    names = ",".join(accelerator.devices)
    with ExitStack() as stack:

        def place(
            model: nn.Module, where: Mapping[str, str] | PlacementPolicy, devices: str = f"cpu,{names}"
        ) -> PlacedModel:
            policy = ManualPolicy(dict(where)) if isinstance(where, Mapping) else where
            return stack.enter_context(_placed(model, policy, devices))

        yield place
