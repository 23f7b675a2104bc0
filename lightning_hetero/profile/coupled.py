"""Modules that make the rows of a batch depend on each other, so that a batch cannot be cut where they run."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def coupled_modules(module: nn.Module) -> tuple[str, ...]:
    """Names of the modules below that normalise by the mean and variance of the batch, as they are now.

    Other couplings, in code of the user's own, are found by the trial of the runtime only.
    """
    return tuple(
        name
        for name, inner in module.named_modules()
        if isinstance(inner, _BatchNorm) and (inner.training or inner.running_mean is None)
    )
