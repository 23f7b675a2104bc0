"""Which leaves an autograd graph depends on, and sums of their gradients in an order that timing cannot change."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_hetero.runtime.transfer import to_device

# The class of the nodes that accumulate into leaves; torch does not name it.
_ACCUMULATE: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


def walk(outputs: Iterable[Tensor], known: Sequence[Tensor] = ()) -> tuple[list[GradientEdge], list[Tensor], set[Node]]:
    """The graph behind some tensors.

    Args:
        outputs: Tensors that require a gradient and have a graph.
        known: Leaves that are not to be listed.

    Returns:
        The edges to the graph's leaves, the leaves, and all inner nodes. A backward is asked for edges and not for
        leaves: a leaf that was frozen in between would be refused, its edge is not.
    """
    known_ids = set(map(id, known))
    edges: list[GradientEdge] = []
    leaves: list[Tensor] = []
    todo: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    inner: set[Any] = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if type(node) is _ACCUMULATE:
                leaf: Tensor = node.variable
                if id(leaf) not in known_ids:
                    known_ids.add(id(leaf))
                    edges.append(GradientEdge(node, 0))
                    leaves.append(leaf)
            elif node is not None and node not in inner:
                inner.add(node)
                todo.append(node)
    return edges, leaves, inner


def gradients(
    outputs: Sequence[Tensor], given: Sequence[Tensor], wanted: Sequence[Tensor | GradientEdge], *, keep_graph: bool
) -> Sequence[Tensor | None]:
    """What `torch.autograd.grad` returns, without its checks, which cost more than a small module.

    Args:
        outputs: Where the backward begins.
        given: Their gradients, of the same shapes.
        wanted: Leaves, or edges to them; None is returned for those that the outputs do not depend on.
        keep_graph: Whether there may be another backward.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    found: Sequence[Tensor | None] = engine.run_backward(
        tuple(outputs), tuple(given), keep_graph, False, tuple(wanted), allow_unreachable=True, accumulate_grad=False
    )
    return found


class OrderedSums:
    """Sums of gradients, each made in the order of lanes and calls, whatever the order in which gradients arrive.

    A floating-point sum depends on its order. Two workers that finish in another order than yesterday must not
    change the last digits, so what a source brings for a lane waits until all that it will bring for lower lanes has
    come. Sources are units, and the code of the lanes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: dict[int, Counter[Hashable]] = {}
        self._ended: set[int] = set()
        self._sources: dict[Hashable, _Source] = {}

    def announce(self, lane: int, sources: Iterable[Hashable]) -> None:
        """Say what a lane's backward may bring, before it begins: one source for each call, repeated ones too."""
        with self._lock:
            self._expected[lane] = Counter(sources)
            self._settle()

    def end(self, lane: int) -> None:
        """Say that a lane's backward is over: what has not come by now counts as zero."""
        with self._lock:
            self._ended.add(lane)
            self._settle()

    def add(
        self, source: Hashable, lane: int, number: int, leaves: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        """Bring gradients.

        Args:
            source: Where they come from.
            lane: Index of the lane.
            number: Place among the calls of the lane.
            leaves: The leaves.
            found: Their gradients.
        """
        with self._lock:
            known = self._sources.get(source)
            if known is None:
                known = self._sources[source] = _Source()
            known.waiting.setdefault(lane, []).append((number, leaves, found))
            self._settle_one(source, known)

    def totals(self) -> dict[int, Tensor]:
        """Gradients by `id` of the leaf, once every lane has ended."""
        totals: dict[int, Tensor] = {}
        for _, source in sorted(self._sources.items(), key=lambda item: repr(item[0])):
            for leaf, total in source.sums.items():
                known = totals.get(leaf)
                # What replicas have summed up comes home here, in one piece.
                here = to_device(total, source.home[leaf])
                totals[leaf] = here if known is None else _plus(known, here)
        return totals

    def clear(self) -> None:
        """Let go of the gradients."""
        self._sources.clear()

    def _settle(self) -> None:
        for name, source in self._sources.items():
            self._settle_one(name, source)

    def _settle_one(self, name: Hashable, source: _Source) -> None:
        while (expected := self._expected.get(lane := source.next_lane)) is not None:
            if lane not in self._ended and len(source.waiting.get(lane, ())) < expected[name]:
                return
            source.take(lane)


class _Source:
    """The sums of one source. See `OrderedSums`."""

    def __init__(self) -> None:
        self.waiting: dict[int, list[tuple[int, Sequence[Tensor], Sequence[Tensor | None]]]] = {}
        self.next_lane = 0
        self.sums: dict[int, Tensor] = {}
        self.home: dict[int, torch.device] = {}
        self._ours: set[int] = set()  # leaves whose sum is a tensor that was made here
        self._alone: set[int] = set()  # those whose sum nobody else has, as was seen when something was added first

    def take(self, lane: int) -> None:
        """Add what has come for a lane, and go on to the next lane."""
        come = self.waiting.pop(lane, ())
        for _, leaves, found in sorted(come, key=itemgetter(0)) if len(come) > 1 else come:
            self._sum(leaves, found)
        self.next_lane = lane + 1

    def _sum(self, leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                continue
            key = id(leaf)
            known = self.sums.get(key)
            if known is None:
                self.sums[key] = gradient
                self.home[key] = leaf.device
                continue
            if gradient.device != known.device:  # code on a replica may use the original too
                gradient = to_device(gradient, known.device)
            # Autograd may hand out one tensor for two leaves (of y = a + b), and user code may keep what it returns. So
            # the first sum is a new tensor, unless nobody else has the first gradient.
            if key in self._ours:
                in_place = not known.is_sparse
            else:
                in_place = (key in self._alone or _has_one_owner(known)) and _memory(gradient) is not None
            if in_place:
                known.add_(gradient)
                self._alone.add(key)
            else:
                self.sums[key] = _plus(known, gradient)
                self._ours.add(key)


_CAN_TELL = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")  # torch does not document them


def _references_to(base: Tensor) -> tuple[int, int]:
    """References to the tensor that another is a view of: Python's, and torch's own."""
    return sys.getrefcount(base), base._use_count()  # type: ignore[attr-defined]


def _least_references() -> tuple[int, int]:
    """Those to one that nobody has but its view; whether torch holds one of Python's depends on its release."""
    with torch.inference_mode(False):
        view = torch.zeros(2, 2, device="cpu").t()
    base = view._base
    assert base is not None
    return _references_to(base)


_LEAST_REFERENCES = _least_references() if _CAN_TELL else (0, 0)
_REFERENCES = 4  # to a gradient in `_sum`: in `sums`, `known`, the argument here, and that of `getrefcount`


def _has_one_owner(gradient: Tensor) -> bool:
    """Whether nothing but `_Source.sums` can reach a gradient's memory.

    New memory for a large sum costs several times what the sum does.
    """
    if not _CAN_TELL or type(gradient) is not Tensor or gradient.layout is not torch.strided:
        return False
    storage = _memory(gradient)
    if storage is None:
        return False
    owners = 2  # of the memory: the tensor, and `storage`
    if (base := gradient._base) is not None:  # that of a linear layer's weight is the transpose of a product
        if _references_to(base) != _LEAST_REFERENCES:
            return False
        owners += 1
    return (
        sys.getrefcount(gradient) <= _REFERENCES
        and gradient._use_count() == 1  # type: ignore[attr-defined]
        and torch._C._storage_Use_Count(storage._cdata) <= owners
        and torch.ops.aten.is_non_overlapping_and_dense(gradient)  # that of `weight.sum()` is one number, seen often
    )


def _memory(tensor: Tensor) -> Any:
    """Where its numbers are; None if it stands for many tensors, as in a vectorized Jacobian."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


def _plus(a: Tensor, b: Tensor) -> Tensor:
    return b + a if a.is_sparse and not b.is_sparse else a + b  # torch adds a sparse tensor to a dense one only
