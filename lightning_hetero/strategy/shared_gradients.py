"""The gradients that the processes of a run share: each has those of its rows, and all use the sums."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hetero.errors import UsageError
from lightning_hetero.runtime.processes.group import Group
from lightning_hetero.runtime.processes.reducer import GradientReducer

log = logging.getLogger(__name__)

GRADIENTS_VARIABLE = "HETERO_GRADIENTS"
"""Environment variable: "host" lets gradients go through host memory, whatever the devices are."""
_BUCKETS_OF_FREE = 8  # times the size of all gradients has to be free for buckets to be on a device


class SharedGradients:
    """Sums the gradients of one model over all processes.

    Args:
        group: All processes.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._reducer: GradientReducer | None = None
        self._parameters: list[nn.Parameter] = []
        self._holds_sums = False
        self._hooks: list[Any] = []  # of parameters, with manual optimization
        self._in_backward = False
        self._stray = False  # whether gradients came from a backward that this class has not seen
        self._summed: set[int] = set()  # ids of parameters whose gradients are sums that no optimizer has used yet,
        self._used: set[int] = set()  # and those that one has used in this step
        self._step_hooks: list[Any] = []  # of optimizers, with manual optimization

    def attach(self, model: nn.Module, *, is_manual: bool) -> None:
        """Sum the gradients of this model; again after a change of plan, which may have replaced parameters.

        Args:
            model: The placed one.
            is_manual: Whether user code runs the backward.
        """
        self._parameters = list(model.parameters())
        if self._reducer is None:
            names = [name for name, _ in model.named_parameters()]
            device = self._device_of_buckets()
            between = self._group.between_devices(device)
            if between is not None:
                log.info("gradients go from %s to those of the other processes, not through host memory", device)
            self._reducer = GradientReducer(
                self._parameters, self._group.gradients, names=names, device=device, between_devices=between
            )
        else:  # a new one would want to hear of the others, who may not have changed their plans
            self._reducer.exchange(self._parameters)
        self._let_go()
        if is_manual:
            self._hooks = [
                p.register_post_accumulate_grad_hook(self._note_backward) for p in self._parameters if p.requires_grad
            ]

    def _device_of_buckets(self) -> torch.device | None:
        """Where gradients may be added up without host memory: the only device with parameters, if it has the room."""
        devices = {parameter.device for parameter in self._parameters}
        if len(devices) != 1 or os.environ.get(GRADIENTS_VARIABLE, "") == "host":
            return None
        (device,) = devices
        if device.type == "cpu":
            return None
        # No plan counts the buckets, which take as much as the gradients.
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        free_bytes = 0 if ask is None else ask(device)[0]
        gradient_bytes = sum(p.numel() * p.element_size() for p in self._parameters if p.requires_grad)
        return device if _BUCKETS_OF_FREE * gradient_bytes <= free_bytes else None

    def _let_go(self) -> None:
        hooks = [*self._hooks, *self._step_hooks]
        self._hooks, self._step_hooks = [], []
        for hook in hooks:
            hook.remove()

    def _note_backward(self, parameter: Tensor) -> None:
        self._stray = self._stray or not self._in_backward

    def detach(self) -> None:
        """Leave the model as it was."""
        self._let_go()
        reducer, self._reducer = self._reducer, None
        if reducer is not None:
            reducer.close()

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """A training step with manual optimization begins: these may use gradients only that are sums."""
        self._summed -= self._used
        self._used.clear()
        for hook in self._step_hooks:  # they may be other optimizers now
            hook.remove()
        self._step_hooks = [each.register_step_post_hook(self._check_used) for each in optimizers]

    def before_step(self) -> None:
        """The optimizer steps after the backward that comes: sums of gradients may go out while it runs."""
        if self._reducer is not None:
            self._reducer.begin()

    def hold_sums(self) -> None:
        """Before a backward: sums of an earlier one that still stand are kept by one process through the next sum.

        Those are gradients that nobody has cleared: with manual optimization, and of parameters without optimizer.
        """
        if self._holds_sums and self._group.rank:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        self._holds_sums = False

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Gradients of a backward are weighted, and will be summed."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    def check_sums(self) -> None:
        """Before an optimizer steps.

        Raises:
            UsageError: Gradients came from a backward that this class has not seen.
        """
        if self._stray:
            self._stray = False
            raise UsageError(
                "the gradients of this step come from loss.backward(), which knows nothing of the other processes, so "
                "each would go its own way. Write self.manual_backward(loss) instead."
            )

    def _check_used(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After an optimizer has stepped: not before, since its closure may have run the backward."""
        self.check_sums()
        used = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if not used <= self._summed:
            raise UsageError(
                "an optimizer has stepped with gradients that do not come from self.manual_backward(loss), such as "
                "those of torch.autograd.grad. They are of the rows of this process only, so each would go its own "
                "way. Write self.manual_backward(loss) instead; for gradients g of your own, let loss be the sum of "
                "(p * g).sum() over the parameters p."
            )
        self._used |= used

    def sum_gradients(self) -> None:
        """The gradients of all processes, on all of them."""
        assert self._reducer is not None
        with self._group.answered("in the sum of gradients"):
            self._reducer.finish()
        self._holds_sums = True
        if self._hooks:
            self._summed |= {id(parameter) for parameter in self._parameters if parameter.grad is not None}
