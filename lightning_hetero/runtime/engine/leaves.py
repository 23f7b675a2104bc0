"""Which leaves an autograd graph depends on, and sums of their gradients in an order that timing cannot change."""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_hetero.runtime.transfer import to_device

OWN_CODE = -1  # source of gradients that the code of lanes brings; units have numbers from 0
_new: Any = tuple.__new__  # of a named tuple, without the function of its own
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
    todo: list[Any] = []
    for output in outputs:
        if output.grad_fn is not None:
            todo.append(output.grad_fn)  # a comprehension is a call, and this runs in every call of a unit
    inner: set[Any] = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if type(node) is _ACCUMULATE:
                leaf: Tensor = node.variable
                if id(leaf) not in known_ids:
                    known_ids.add(id(leaf))
                    edges.append(_new(GradientEdge, (node, 0)))
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
    change the last digits. So each lane has a sum of its own, from its last call to its first, and these are added up
    from the first lane to the last, as they would be if one backward ran after the other. What comes too early waits.
    Sources are units, and the code of the lanes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: dict[int, dict[Hashable, list[int]]] = {}
        self._ended: set[int] = set()
        self._sources: dict[Hashable, _Source] = {}

    def announce(self, lane: int, calls: Iterable[Hashable]) -> None:
        """Say what a lane's backward may bring, before it begins.

        Args:
            lane: Index of the lane.
            calls: The source of each of its calls, in order; the code of the lane itself is always a source.
        """
        expected: dict[Hashable, list[int]] = {OWN_CODE: [0]}
        for number, source in enumerate(calls):
            expected.setdefault(source, []).append(number)
        with self._lock:
            self._expected[lane] = expected
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
            lane: Index of the lane, which is announced.
            number: Place among the calls of the lane.
            leaves: The leaves.
            found: Their gradients.
        """
        with self._lock:
            known = self._sources.get(source)
            if known is None:
                known = self._sources[source] = _Source()
            expected = self._expected[lane].get(source, ())
            if known.next_lane == lane and len(expected) == 1:  # nothing to wait for
                known.next_lane += 1
                known.sum.add(leaves, found)
                if not known.lanes:
                    return
            else:
                known.come(lane, expected, number, leaves, found)
            self._settle_one(source, known)

    def sum_of(self, source: Hashable, lane: int) -> Sum | None:
        """Where a lane may add what comes from a source by itself, before it says so by `add`; None if it may not.

        That is when nothing has to come before it, neither from other lanes nor from other calls of this one.
        """
        with self._lock:
            known = self._sources.get(source)
            if known is None:
                known = self._sources[source] = _Source()
            is_only = len(self._expected[lane].get(source, ())) == 1
            return known.sum if is_only and known.next_lane == lane else None

    def is_turn_of(self, source: Hashable, lane: int) -> bool:
        """Whether what a lane brings now would not wait for others; True too where the wait may be a long one.

        That is where a lower lane calls the source more than once: other devices may be at work between these calls.
        """
        known = self._sources.get(source)
        if known is not None and known.next_lane >= lane:  # which only grows
            return True
        with self._lock:
            known = self._sources.get(source)
            for other in range(0 if known is None else known.next_lane, lane):
                expected = self._expected.get(other)
                if other not in self._ended and (expected is None or len(expected.get(source, ())) == 1):
                    return False
            return True

    def totals(self) -> dict[int, Tensor]:
        """Gradients by `id` of the leaf, once every lane has ended."""
        totals: dict[int, Tensor] = {}
        for _, source in sorted(self._sources.items(), key=lambda item: repr(item[0])):
            for leaf, total in source.sum.tensors.items():
                home = source.sum.leaves[leaf].device
                # What replicas have summed up comes home here, in one piece.
                here = total if total.device == home else to_device(total, home)
                totals[leaf] = _plus(totals[leaf], here) if leaf in totals else here
        return totals

    def clear(self) -> None:
        """Let go of the gradients."""
        self._sources.clear()

    def _settle(self) -> None:
        for name, source in self._sources.items():
            if source.lanes:  # nothing waits in the others, and what comes to them looks for itself
                self._settle_one(name, source)

    def _settle_one(self, name: Hashable, source: _Source) -> None:
        while (expected := self._expected.get(lane := source.next_lane)) is not None:
            if lane not in self._ended and not source.has_all(lane, expected.get(name, ())):
                return
            source.take(lane)


class _Source:
    """The sums of one source. See `OrderedSums`.

    Attributes:
        sum: Of the lanes before `next_lane`.
        next_lane: The first that has not brought everything.
        lanes: What has come from it and later ones.
    """

    def __init__(self) -> None:
        self.sum = Sum()
        self.next_lane = 0
        self.lanes: dict[int, _OfLane] = {}

    def come(
        self, lane: int, expected: Sequence[int], number: int, leaves: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> None:
        """Take what one of the calls of a lane brings."""
        of_lane = self.lanes.get(lane)
        if of_lane is None:
            of_lane = self.lanes[lane] = _OfLane()
        of_lane.waiting[number] = (leaves, found)
        if len(expected) > 1:
            of_lane.add_up(expected)

    def has_all(self, lane: int, expected: Sequence[int]) -> bool:
        """Whether all calls of a lane have brought something."""
        if not expected:
            return True
        of_lane = self.lanes.get(lane)
        return of_lane is not None and of_lane.count + len(of_lane.waiting) >= len(expected)

    def take(self, lane: int) -> None:
        """Add what has come for a lane, and go on to the next lane."""
        self.next_lane = lane + 1
        of_lane = self.lanes.pop(lane, None)
        if of_lane is None:
            return
        if not of_lane.count and len(of_lane.waiting) == 1:
            _, (leaves, found) = of_lane.waiting.popitem()
            self.sum.add(leaves, found)
            return
        part = of_lane.rest()
        while part.tensors:  # one after the other, so that nobody else has what is added
            key, gradient = part.tensors.popitem()
            self.sum.add((part.leaves[key],), (gradient,))


class _OfLane:
    """The sum of one source in one lane, from the last call to the first.

    Attributes:
        sum: Of the calls that had their turn.
        count: How many these are.
        waiting: What others have brought, by their number.
    """

    def __init__(self) -> None:
        self.sum = Sum()
        self.count = 0
        self.waiting: dict[int, tuple[Sequence[Tensor], Sequence[Tensor | None]]] = {}

    def add_up(self, expected: Sequence[int]) -> None:
        """Add what has its turn. A call that brings nothing holds up those before it, until the lane has ended."""
        while self.count < len(expected) and (number := expected[-1 - self.count]) in self.waiting:
            self.sum.add(*self.waiting.pop(number))
            self.count += 1

    def rest(self) -> Sum:
        """The sum with all that has come; the lane brings no more."""
        for number in sorted(self.waiting, reverse=True):
            self.sum.add(*self.waiting.pop(number))
        return self.sum


class Sum:
    """A sum for each of some leaves.

    Attributes:
        tensors: The sums, by `id` of the leaf.
        leaves: The leaves, likewise.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self._ours: set[int] = set()  # leaves whose sum is a tensor that was made here
        self._alone: set[int] = set()  # those whose sum nobody else has, as was seen when something was added first

    def add(self, leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        """Add the gradients of some leaves."""
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                continue
            key = id(leaf)
            known = self.tensors.get(key)
            if known is None:
                self.tensors[key] = gradient
                self.leaves[key] = leaf
                continue
            if gradient.device != known.device:  # code on a replica may use the original too
                gradient = to_device(gradient, known.device)
            # Autograd may hand out one tensor for two leaves (of y = a + b), and user code may keep what it returns. So
            # the first sum is a new tensor, unless nobody else has the first gradient.
            if key in self._alone:
                known.add_(gradient)
            elif not known.is_sparse if key in self._ours else _has_one_owner(known) and _memory(gradient) is not None:
                known.add_(gradient)
                self._alone.add(key)
            else:
                self.tensors[key] = _plus(known, gradient)
                self._ours.add(key)


_IS_DENSE = torch.ops.aten.is_non_overlapping_and_dense.default
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
_REFERENCES = 4  # to a gradient in `Sum.add`: in `tensors`, `known`, the argument here, and that of `getrefcount`


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
        and (gradient.is_contiguous() or _IS_DENSE(gradient))  # that of `weight.sum()` is one number, seen often
    )


def _memory(tensor: Tensor) -> Any:
    """Where its numbers are; None if it stands for many tensors, as in a vectorized Jacobian."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


def _plus(a: Tensor, b: Tensor) -> Tensor:
    return b + a if a.is_sparse and not b.is_sparse else a + b  # torch adds a sparse tensor to a dense one only
