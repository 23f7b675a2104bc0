"""Naps of random lengths, so that what depends on timing is seen, and a module that keeps a mean."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor, nn


def nap() -> None:
    """Sleep up to 3 ms. The length is no random number of the run, and of no generator, which would be state."""
    time.sleep(os.urandom(1)[0] / 255 * 3e-3)


class _Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float | None) -> Tensor:
        ctx.seconds = seconds
        if seconds is None:
            nap()
        else:
            time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.seconds is None:
            nap()
        else:
            time.sleep(2 * ctx.seconds)
        return gradient, None


def late(x: Tensor, seconds: float | None = None) -> Tensor:
    """The same tensor, after a nap; and so its gradient, after one of twice that length.

    Args:
        x: The tensor.
        seconds: How long the nap is; None for another length each time, see `nap`.
    """
    return _Nap.apply(x, seconds)  # type: ignore[no-any-return, no-untyped-call]


class RunningMean(nn.Module):
    """Keeps a mean of what it sees, in evaluation too, and subtracts it. Shape (rows, 8)."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        nap()
        return x - self.mean
