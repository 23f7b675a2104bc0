"""Batch normalisation over micro-batches with running statistics of the whole batch.

Each micro-batch is normalised by its own mean and variance, which is not what one device does; so this is used only
where the user asks for it. The running statistics are then those of one device: they are updated once for a batch, from
the mean and variance of all its rows. After Kim et al., "torchgpipe: On-the-fly Pipeline Parallelism for Training Giant
Models", 2020 (its DeferredBatchNorm).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import to_device

# Classes whose forward is known; a subclass may do anything.
DEFERRABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def uses_batch(module: nn.Module) -> bool:
    """Whether a module normalises by the mean and variance of its batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def using_batch(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of some modules that do."""
    return [module for module in modules if isinstance(module, _BatchNorm) and uses_batch(module)]


def can_defer(module: nn.Module) -> bool:
    """Whether `Deferred` knows how to update the module's running statistics."""
    return type(module) in DEFERRABLE


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some values, by channel.

    Attributes:
        count: How many values a channel has.
        mean: Shape (channels,).
        deviation: Sum of the squares of value minus mean, shape (channels,).
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of the input of a batch normalisation, shape (rows, channels, ...)."""
        values = x.detach().transpose(0, 1).flatten(1)
        values = values if values.dtype == torch.float64 else values.float()
        variance, mean = torch.var_mean(values, 1, correction=0)
        return cls(values.shape[1], mean, variance * values.shape[1])

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        return Moments(self.count, to_device(self.mean, device), to_device(self.deviation, device))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both together (Chan et al., "Updating formulae for computing sample variances", 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        deviation = self.deviation + other.deviation + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, deviation)


@dataclass
class _Collect(Hook):
    """Forward pre-hook of a batch normalisation: notes the moments of each micro-batch."""

    lock: Any = field(default_factory=threading.Lock)
    calls: dict[int, list[Moments]] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """What torch calls, on the worker."""
        moments = Moments.of(args[0])
        with self.lock:
            self.calls.setdefault(frames.micro_batch(), []).append(moments)


class Deferred:
    """The batch normalisations of one region call.

    Args:
        modules: Those that use the batch.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules: list[Any] = [module for module in modules if module.track_running_stats]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Within the block, running statistics are not updated."""
        for module in self._modules:
            module.__dict__["track_running_stats"] = False
        try:
            yield
        finally:
            for module in self._modules:
                module.__dict__["track_running_stats"] = True

    def collecting(self) -> AbstractContextManager[None]:
        """Within the block, micro-batches run; after it, running statistics are those of the whole batch."""
        return self._collecting() if self._modules else nullcontext()

    @contextmanager
    def _collecting(self) -> Iterator[None]:
        hooks = [(module, _Collect()) for module in self._modules]
        handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
        try:
            with self.untouched():
                yield
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for module, hook in hooks:
                for moments in _of_batch(hook.calls):
                    _update(module, moments)


def _of_batch(calls: Mapping[int, list[Moments]]) -> Iterator[Moments]:
    """The moments of the whole batch, for every time that the module was called."""
    lanes = [calls[index] for index in sorted(calls)]
    for together in zip(*lanes, strict=True):
        total = together[0]
        for moments in together[1:]:
            total = total + moments.to(total.mean.device)
        yield total


def _update(module: Any, moments: Moments) -> None:
    """What the forward of the whole batch does to the running statistics."""
    module.num_batches_tracked.add_(1)
    factor = 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    variance = moments.deviation / max(moments.count - 1, 1)
    for running, value in ((module.running_mean, moments.mean), (module.running_var, variance)):
        running.mul_(1 - factor).add_(to_device(value, running.device).to(running.dtype), alpha=factor)
