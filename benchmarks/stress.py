"""Trains for many steps while workers are delayed at random, and compares with the same training left in peace.

Every placement has to give the same parameters bit for bit, however late its workers are, and no step may hang. The
delays are sleeps of up to a millisecond before a third of all calls of placed modules, forward and backward.
"""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import torch
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import HangError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.testing import install_accelerator

PLACEMENTS = (("dev:0", "dev:1"), ("cpu", "dev:0"), ("dev:0", "cpu", "dev:1", "dev:0"), ("dev:1", "cpu", "dev:1"))
STEPS, QUICK_STEPS = 2500, 20
HANG_S = 60.0


class Late(torch.autograd.Function):
    """Nothing, but later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delayed: bool) -> Tensor:  # noqa: D102
        ctx.delayed = delayed
        sleep(delayed)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        sleep(ctx.delayed)
        return gradient, None


def chance() -> float:
    """Of the machine, and not of a generator: that would be state, which forbids to cut a model."""
    return os.urandom(1)[0] / 256


def sleep(delayed: bool) -> None:
    if delayed and chance() < 1 / 3:
        time.sleep(chance() * 1e-3)


class Block(nn.Module):
    """A layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.1)
        self.delayed = False

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.drop(torch.tanh(self.linear(Late.apply(x, self.delayed))))  # type: ignore[no-untyped-call]


def train(model: nn.Module, devices: tuple[str, ...], steps: int, delayed: bool) -> list[Tensor]:
    """Train in micro-batches; gives the parameters."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    where = {f"{index}": devices[index * len(devices) // len(blocks)] for index in range(len(blocks))}
    graph = find_units(model, ["Block"])
    plan = make_plan(ManualPolicy(where), Problem(graph=graph, inventory=resolve_devices("cpu,dev:0,dev:1")))
    placed = PlacedModel(model, plan, Pipelining(micro_batches=4, hang_timeout_s=HANG_S))
    placed.place()
    mode = placed.reconciler()
    assert mode is not None
    activate(mode)
    try:
        for block in blocks:
            block.delayed = delayed
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        torch.manual_seed(1)
        x = torch.randn(10, 16)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert placed.engine is not None
        assert placed.engine.cut_calls == steps
        return [parameter.detach().cpu().clone() for parameter in model.parameters()]
    finally:
        deactivate(mode)
        placed.release(torch.device("cpu"))


def main() -> None:
    quick = is_quick(__doc__)
    install_accelerator()
    steps = QUICK_STEPS if quick else STEPS
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    figures = {"steps": 0.0, "hangs": 0.0, "differing_placements": 0.0}
    for devices in PLACEMENTS:
        try:
            quiet, late = (train(copy.deepcopy(model), devices, steps, delayed) for delayed in (False, True))
        except HangError as error:
            print(f"{', '.join(devices)}: {error}")
            figures["hangs"] += 1
            continue
        figures["steps"] += steps
        figures["differing_placements"] += not all(map(torch.equal, quiet, late))
    report(figures)


if __name__ == "__main__":
    main()
