"""Batch normalisation by the mean and variance of the rows of all processes, on any device.

After S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", 2015, and for the gradient `torch.nn.SyncBatchNorm`, which refuses the CPU. Each process sends count, mean and
sum of squared deviations of its rows; they are put together by the formula of Chan et al., "Updating formulae and a
pairwise algorithm for computing sample variances", 1979, which loses no digits where the mean is large beside the
deviations, as a sum of squares does.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.engine.batch_norm import Moments, uses_batch
from lightning_hetero.runtime.engine.lanes import current_lane
from lightning_hetero.runtime.engine.worker import Worker
from lightning_hetero.runtime.processes.rounds import Place, Rounds
from lightning_hetero.runtime.standin import StandIn
from lightning_hetero.runtime.transfer import to_device

_HOST = torch.device("cpu")


class GlobalBatchNorm:
    """Lets the batch normalisations of a model see the rows of all processes.

    Outputs, running statistics and gradients become those of one process that has all rows. Gradients of weights and
    biases are each process's part, to be summed over the processes with all others; losses have to be weighted by rows.
    Statistics of 16-bit values are computed in 32 bits. This holds in training, and in evaluation for modules without
    running statistics, which normalise by the batch there, too. In evaluation by running statistics nothing changes.

    Each process has to call the same of these modules in the same order, forward and backward. Where they do not, all
    raise `ProcessError`. Branches of a model on different accelerators may get there: autograd runs a thread for each.
    The gradient of a gradient (`create_graph=True`) raises `UnsupportedError`, as it would need a third exchange.

    What runs is the module's own `forward`, with another `torch.nn.functional.batch_norm`; so subclasses with a
    `forward` of their own may stay as they are. One that normalises without that function raises `UnsupportedError`
    when it is called. The `process_group` of a `SyncBatchNorm` is not looked at: one process has all rows.

    Args:
        root: The model.
        group: A gloo group of all processes that is used for nothing else; None: the default group.
        rank: Of this process.
        size: How many processes there are; for one, nothing is changed.
    """

    def __init__(self, root: nn.Module, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self._root = root
        self._group = group
        self._rank = rank
        self._size = size
        self._steps = itertools.count()
        self._calls = itertools.count()  # goes on in the next step: graphs of earlier calls may be there yet
        self._attached: list[_Global] = []
        self._rounds: Rounds | None = None
        self._waited_s = 0.0  # in those before

    @property
    def waited_s(self) -> float:
        """Seconds that this process has spent in exchanges, waiting for others included."""
        return self._waited_s + (0.0 if self._rounds is None else self._rounds.waited_s)

    def attach(self) -> None:
        """Take the place of the modules' `forward`, at the beginning of a step on all processes.

        Modules are looked for anew. Copies and pickles of them come without. Planning runs models for itself: let
        none be attached meanwhile.

        Raises:
            UnsupportedError: A lazy module does not know its channels yet.
        """
        self.detach()
        norms = list(self._norms())
        if self._size == 1 or not norms:
            return
        for name, norm in norms:
            if not norm.num_features:
                raise UnsupportedError(
                    f"{name} ({type(norm).__name__}) does not know its number of channels yet, and the processes have "
                    "to agree on the size of their messages. Run a batch through the model before training."
                )
        widest = max(norm.num_features for _, norm in norms)
        self._waited_s = self.waited_s
        self._rounds = rounds = Rounds(
            self._group, self._rank, self._size, next(self._steps), self._calls, [name for name, _ in norms], 2 * widest
        )
        self._attached = [_Global(norm, name, index, rounds) for index, (name, norm) in enumerate(norms)]
        for each in self._attached:
            each.install()

    def detach(self) -> None:
        """Give every module back the `forward` that it had.

        Not before the backward: where that runs forwards again (activation checkpointing), they would see the rows of
        one process, and gradients would be wrong without an error.
        """
        for each in reversed(self._attached):
            each.remove()
        self._attached = []

    @property
    def needs_all_ranks(self) -> str | None:
        """Name of a module that normalises by the batch now; None if there is none.

        With such a module, a process that has no rows of a batch would keep the others waiting.
        """
        norms = self._norms() if self._size > 1 else iter(())
        return next((name for name, norm in norms if uses_batch(norm)), None)

    def _norms(self) -> Iterator[tuple[str, _BatchNorm]]:
        for name, module in self._root.named_modules():
            if isinstance(module, _BatchNorm):
                yield name or type(module).__name__, module


class _Global(StandIn):
    """Stands in for the `forward` of a batch normalisation."""

    module: _BatchNorm

    def __init__(self, module: _BatchNorm, name: str, index: int, rounds: Rounds) -> None:
        super().__init__(module)
        self.name = name
        self.index = index
        self.rounds = rounds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls."""
        if not uses_batch(self.module):
            return self.plain(*args, **kwargs)
        if current_lane() is not None or isinstance(threading.current_thread(), Worker):
            raise UnsupportedError(
                f"{self.name} normalises by the whole batch of all processes, but is called for a micro-batch of this "
                'one. With several processes use batch_norm="whole" and micro_batching="forward".'
            )
        forward = self.plain
        if getattr(forward, "__func__", None) is nn.SyncBatchNorm.forward:
            forward = functools.partial(_BatchNorm.forward, self.module)  # its own is for some devices only
        with _Instead(self) as instead:
            output = forward(*args, **kwargs)
        if not instead.used:
            raise UnsupportedError(
                f"{self.name} ({type(self.module).__name__}) normalises its batch in a way of its own, without "
                "torch.nn.functional.batch_norm, so its rows in other processes would be left out. Use a "
                "torch.nn.BatchNorm, or one process."
            )
        return output

    def normalise(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """What `torch.nn.functional.batch_norm` does, over the rows of all processes."""
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        place = self.rounds.next_call(self.index, records=torch.is_grad_enabled() and input.requires_grad)
        with torch.no_grad():
            together = self._moments(input, place)
            mean, variance = (
                to_device(value.to(_precision(input)), input.device)
                for value in (together.mean, together.deviation / together.count)
            )
            unbiased = variance * (together.count / (together.count - 1))
            for running, value in ((running_mean, mean), (running_var, unbiased)):
                if running is not None:
                    running.copy_(running.to(value.dtype) * (1 - momentum) + value * momentum)
        apply: Any = _Normalise.apply
        output: Tensor = apply(input, weight, bias, mean, variance, eps, (self, place, together.count))
        return output

    def sums(self, place: Place, *sums: Tensor) -> list[Tensor]:
        """Sums over all processes, each of shape (channels,), in the backward of a call."""
        values = torch.cat([to_device(each, _HOST).double() for each in sums])
        rows = self.rounds.gather(replace(place, in_backward=True), 0, values)
        total = torch.stack([values for _, values in rows]).sum(0)  # in the same order, so the same on all ranks
        return [to_device(part.to(like.dtype), like.device) for part, like in zip(total.chunk(2), sums, strict=True)]

    def _moments(self, x: Tensor, place: Place) -> Moments:
        """Count, mean and deviations over all processes, in float64 on the host."""
        channels = self.module.num_features
        if x.shape[1] != channels:
            raise UnsupportedError(f"{self.name} is for {channels} channels, and its input has {x.shape[1]}.")
        own = _moments(x) if x.numel() else Moments(0, torch.zeros(channels), torch.zeros(channels))
        own = own.to(_HOST)
        rows = self.rounds.gather(place, own.count, torch.cat([own.mean.double(), own.deviation.double()]))
        parts = [Moments(count, *values.chunk(2)) for count, values in rows if count]
        if sum(part.count for part in parts) < 2:
            raise UnsupportedError(f"{self.name} got fewer than two values per channel, which have no variance.")
        return functools.reduce(operator.add, parts)


class _Instead(TorchFunctionMode):
    """Within the block, `torch.nn.functional.batch_norm` is that of all processes.

    Attributes:
        used: Whether it was called.
    """

    def __init__(self, norm: _Global) -> None:
        super().__init__()
        self._norm = norm
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        self.used = True
        return self._norm.normalise(*args, **(kwargs or {}))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance depend on the x of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        origin: tuple[_Global, Place, int],
    ) -> Tensor:
        """Normalise; shapes as in `torch.nn.functional.batch_norm`."""
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.origin = origin
        ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in (weight, bias)]
        weight, bias = (None if value is None else value.to(mean.dtype) for value in (weight, bias))
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of this process's inputs, and its part of those of the parameters."""
        norm, place, count = ctx.origin
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"the gradient of a gradient through {norm.name} over several processes is not supported: it was asked "
                "for by create_graph=True. Use one process, or put that module into evaluation mode."
            )
        x, weight, mean, scale = ctx.saved_tensors
        shape, axes = _layout(x)
        grad = grad.to(mean.dtype)
        normalised = (x - mean.view(shape)).mul_(scale.view(shape))
        # Sums of this process; autograd ignores those that nobody needs.
        for_bias, for_weight = grad.sum(axes), (grad * normalised).sum(axes)
        of_x = None
        if ctx.needs_input_grad[0]:
            shift, slope = (each.view(shape) / count for each in norm.sums(place, for_bias, for_weight))
            slant = scale if weight is None else scale * weight
            of_x = normalised.mul_(-slope).sub_(shift).add_(grad).mul_(slant.view(shape)).to(x.dtype)
        parts = [
            None if dtype is None else part.to(dtype)
            for part, dtype in zip((for_weight, for_bias), ctx.dtypes, strict=True)
        ]
        return of_x, *parts, None, None, None, None


def _precision(x: Tensor) -> torch.dtype:
    """What statistics of the tensor are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _layout(x: Tensor) -> tuple[tuple[int, ...], list[int]]:
    """The shape in which values by channel fit to `x`, and the axes of `x` over which a channel's values lie."""
    return (1, -1, *(1,) * (x.dim() - 2)), [0, *range(2, x.dim())]


def _moments(x: Tensor) -> Moments:
    """The moments of the rows of this process, in two passes: `torch.var_mean` takes several times as long on CPUs."""
    shape, axes = _layout(x)
    values = x.to(_precision(x))
    mean = values.mean(axes)
    return Moments(x.numel() // x.shape[1], mean, (values - mean.view(shape)).square_().sum(axes))
