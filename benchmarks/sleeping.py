"""Stages that sleep instead of working: they leave the processor to whatever drives them, as an accelerator would."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 32


class Nap(torch.autograd.Function):
    """Passes a tensor on after some time, and its gradient after twice that time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, second_per_row: float) -> Tensor:  # noqa: D102
        ctx.second_per_row = second_per_row
        time.sleep(second_per_row * x.shape[0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        time.sleep(2 * ctx.second_per_row * gradient.shape[0])
        return gradient, None


class Stage(nn.Module):
    """A weight, so that it is placed, and a nap. Shape (rows, 4).

    Args:
        batch_s: Seconds that the forward of `ROWS` rows sleeps.
    """

    def __init__(self, batch_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.second_per_row = batch_s / ROWS

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return Nap.apply(x * self.weight, self.second_per_row)  # type: ignore[no-any-return, no-untyped-call]


def timed(run: Callable[[], object]) -> float:
    """Seconds that something takes."""
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s
