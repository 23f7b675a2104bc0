"""Which leaves an autograd graph depends on, and sums of their gradients in an order that timing cannot change."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# The class of the nodes that accumulate into leaves; torch does not name it.
_ACCUMULATE = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


def walk(outputs: Iterable[Tensor], known: Sequence[Tensor] = ()) -> tuple[list[GradientEdge], list[Tensor], set[Node]]:
    """The graph behind some tensors.

    Args:
        outputs: Tensors that require a gradient and have a graph.
        known: Leaves that are not to be listed.

    Returns:
        The edges to the graph's leaves, the leaves, and all inner nodes. A backward is asked for edges and not for
        leaves: a leaf that was frozen in between would be refused, its edge is not.
    """
    skip = set(map(id, known))
    edges: list[GradientEdge] = []
    leaves: list[Tensor] = []
    todo: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Any] = set(todo)
    ends: list[Any] = []
    while todo:
        node = todo.pop()
        if type(node) is _ACCUMULATE:
            ends.append(node)
            accumulate: Any = node
            leaf: Tensor = accumulate.variable
            if id(leaf) not in skip:
                edges.append(GradientEdge(node, 0))
                leaves.append(leaf)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return edges, leaves, seen.difference(ends)


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
    """Sums of gradients, each made in the order of its keys, whatever the order in which they arrive.

    A floating-point sum depends on its order. Two workers that finish in another order than yesterday must not
    change the last digits, so a gradient waits until those of the lower keys of the same source have come.

    Sources are added up in the order in which they were announced.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[Hashable, _Source] = {}

    def announce(self, source: Hashable, key: tuple[int, int]) -> None:
        """Say that `source` may bring gradients under `key`; all keys in order, and before any gradient arrives."""
        self._sources.setdefault(source, _Source()).expected.append(key)

    def add(
        self, source: Hashable, key: tuple[int, int], leaves: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        """Bring the gradients of one key: one for each leaf."""
        with self._lock:
            self._sources[source].arrived(key, leaves, found)

    def totals(self) -> dict[int, Tensor]:
        """Gradient by `id` of the leaf, and an end to the sums. Keys that never arrived count as zero."""
        with self._lock:
            totals: dict[int, Tensor] = {}
            for source in self._sources.values():
                for leaf, total in source.finish().items():
                    known = totals.get(leaf)
                    totals[leaf] = total if known is None else known + total
            self._sources.clear()
            return totals


class _Source:
    """The sums of one source. See `OrderedSums`."""

    def __init__(self) -> None:
        self.expected: list[tuple[int, int]] = []
        self._next = 0
        self._waiting: dict[tuple[int, int], tuple[Sequence[Tensor], Sequence[Tensor | None]]] = {}
        self._sums: dict[int, Tensor] = {}
        self._ours: set[int] = set()

    def arrived(self, key: tuple[int, int], leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        self._waiting[key] = (leaves, found)
        while self._next < len(self.expected) and self.expected[self._next] in self._waiting:
            self._sum(*self._waiting.pop(self.expected[self._next]))
            self._next += 1

    def finish(self) -> dict[int, Tensor]:
        for key in sorted(self._waiting):
            self._sum(*self._waiting.pop(key))
        return self._sums

    def _sum(self, leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                continue
            key = id(leaf)
            known = self._sums.get(key)
            if known is None:
                self._sums[key] = gradient
            elif key in self._ours and not gradient.is_sparse:
                known.add_(gradient)
            else:
                # Autograd may hand out one tensor for two leaves (of y = a + b), so the first sum is a new tensor.
                self._sums[key] = known + gradient
                self._ours.add(key)
