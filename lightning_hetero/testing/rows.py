"""A batch of random rows, and the simplest loss, for tests that compare a model with itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows(count: int = 16, *shape: int) -> Tensor:
    """Random rows, the same each time. Shape (count, *shape), or (count, 8)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *(shape or (8,)), generator=generator, dtype=torch.float64)


def squares(model: nn.Module) -> Tensor:
    """The mean square of what a model makes of 16 rows. Shape ()."""
    y: Tensor = model(rows())
    return y.pow(2).mean()
