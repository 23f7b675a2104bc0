"""Adds gradients of large weights to their sums as soon as autograd has them.

A backward that is asked for gradients returns them all in the end. Those of the first weights have left the processor's
caches by then, and each has memory of its own, which is as cold. A plain loop over micro-batches adds each of them at
once, in memory that is used again for the next. So hooks on the weights do the same here: they add what comes, and hand
autograd a stand-in that takes no memory. The order of the sums is the same, and so is every bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_hetero.runtime.engine.leaves import Sum

LARGE = 1 << 20  # elements; of smaller ones the caches hold several, and nothing is won
_NOTHING: dict[torch.dtype, Tensor] = {}


class AddsAtOnce:
    """The hook on a weight, of one backward of one unit; `Silence` lets it be.

    Args:
        into: Where to add.
        home: The parameter that the weight stands for.
        run: The id of the backward, once it has begun.
    """

    def __init__(self, into: Sum, home: Tensor, run: list[int]) -> None:
        self._into = into
        self._home = home
        self._run = run
        self.is_done = False

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        """Take the gradient of the weight."""
        # User code may differentiate by the weight in the middle of this backward, and another unit may have it too.
        if gradient is None or self._run != [torch._C._current_graph_task_id()]:
            return None
        if type(gradient) is not Tensor or gradient.layout is not torch.strided:
            return None
        self._into.add((self._home,), (gradient,))
        self.is_done = True
        nothing = _NOTHING.get(gradient.dtype)
        if nothing is None:
            nothing = _NOTHING[gradient.dtype] = torch.zeros((), dtype=gradient.dtype, device="cpu")
        return nothing.expand(gradient.shape)


@contextmanager
def adding_at_once(
    into: Sum, edges: Sequence[GradientEdge], homes: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Iterator[list[AddsAtOnce | None]]:
    """Within the block, a backward from `outputs` adds gradients of large weights on the CPU by itself.

    Args:
        into: The sum. Nobody else may add to it meanwhile.
        edges: Edges to the weights in the graph of the outputs.
        homes: What they stand for, of which this is the gradient.
        outputs: Where the backward begins.

    Yields:
        For each weight what tells whether it has been added; None for those that are not looked at.
    """
    run: list[int] = []

    def begins(_: object) -> None:
        if not run:
            run.append(torch._C._current_graph_task_id())

    hooks: list[AddsAtOnce | None] = []
    handles = []
    with torch._C.DisableTorchFunction():  # modes of user code have nothing to see here
        for edge, home in zip(edges, homes, strict=True):
            leaf: Tensor = edge.node.variable  # type: ignore[attr-defined]  # it accumulates
            is_meant = leaf.numel() >= LARGE and leaf.is_cpu and leaf.requires_grad  # which may have changed since
            hook = AddsAtOnce(into, home, run) if is_meant else None
            hooks.append(hook)
            if hook is not None:
                handles.append(leaf.register_hook(hook))
        if handles:
            handles += [node.register_prehook(begins) for node in {output.grad_fn for output in outputs} if node]
    try:
        yield hooks
    finally:
        for handle in handles:
            handle.remove()
