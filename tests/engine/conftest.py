"""Models whose calls are cut into micro-batches, over devices that the CPU plays and over the emulated accelerator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, get_policy, make_plan
from lightning_hetero.runtime.engine.engine import Engine
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.testing.accelerator import EmulatedAccelerator

EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Pair:
    """A model in micro-batches, and the same model on one device.

    Attributes:
        model: The one that is cut.
        alone: The other one.
        engine: What cuts.
    """

    def __init__(self, model: nn.Module, alone: nn.Module, placed: PlacedModel, stack: ExitStack) -> None:
        self.model = model
        self.alone = alone
        self.placed = placed
        self._stack = stack

    def close(self) -> None:
        """Take the model down before the test ends: as long as it is there, it costs the others time."""
        self._stack.close()

    @property
    def engine(self) -> Engine:
        assert self.placed.engine is not None
        return self.placed.engine

    @property
    def calls(self) -> int:
        """How many calls were cut so far."""
        return self.engine.cut_calls

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """One forward and backward of both, with equal gradients in the end."""
        self.model.zero_grad()
        self.alone.zero_grad()
        loss(self.model).backward()
        loss(self.alone).backward()

    @property
    def difference(self) -> float:
        """The largest difference of two gradients; a missing one differs by infinity from one that is there."""
        worst = 0.0
        for (name, p), q in zip(self.model.named_parameters(), self.alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                worst = max(worst, float((p.grad.cpu() - q.grad).abs().max()))
        return worst

    @property
    def relative_difference(self) -> float:
        """The largest difference of two gradients, in parts of the largest gradient."""
        return self.difference / max(float(q.grad.abs().max()) for q in self.alone.parameters() if q.grad is not None)


MakePair = Callable[..., Pair]


@pytest.fixture(params=["emulated", "accelerator"])
def devices(request: pytest.FixtureRequest) -> str:
    """Three devices: the CPU as all of them, or the CPU and the two of the emulated accelerator."""
    if request.param == "emulated":
        return EMULATED
    accelerator: EmulatedAccelerator = request.getfixturevalue("accelerator")
    return ",".join(["cpu", *accelerator.devices[:2]])


@pytest.fixture
def pair(devices: str) -> Iterator[MakePair]:
    """`pair(model)` places a copy of the model in micro-batches, a border at every unit, until the test ends."""
    with ExitStack() as stack:

        def make(
            model: nn.Module,
            where: Mapping[str, str] | str = "round_robin",
            *,
            on: str | None = None,
            no_split: tuple[str, ...] = (),
            **options: Any,
        ) -> Pair:
            alone, cut = model, copy.deepcopy(model)
            policy = get_policy(where) if isinstance(where, str) else ManualPolicy(dict(where))
            problem = Problem(graph=find_units(cut, no_split), inventory=resolve_devices(on or devices))
            options = {"micro_batches": 4, "hang_timeout_s": 30.0, **options}
            placed = PlacedModel(cut, make_plan(policy, problem), Pipelining(**options))
            placed.place()
            own = stack.enter_context(ExitStack())
            own.callback(placed.release, torch.device("cpu"))
            mode = placed.reconciler()
            if mode is not None:
                activate(mode)
                own.callback(deactivate, mode)
            return Pair(cut, alone, placed, own)

        yield make
