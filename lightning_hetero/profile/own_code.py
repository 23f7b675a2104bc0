"""Reads off autograd's graph what a model's own code, outside of units, keeps and needs for its backward.

Nothing is put in the way of user code: the graph is there when a unit is called, from what it is given down to what
earlier units returned, and that of the loss when the step ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.profile.costs import OWN_CODE, Kept, Line, OwnCode, Waiting
from lightning_hetero.profile.flows import TensorSpec

_MOST_NODES = 2000  # that are looked at before one call
_LARGEST_MOMENT = 4.0  # of what is not seen, in tensors: `x.square().mean()` has its gradient, 2 x, x and the product
# Backwards that make gradients of their inputs and nothing else; others are taken to make some more of that size.
_LEAN = (
    *("Add", "Addmm", "Bmm", "Cat", "Clone", "Div", "Elu", "Embedding", "Expand", "Gelu", "Hardtanh", "LeakyRelu"),
    *("LogSoftmax", "Mm", "Mul", "Mean", "MseLoss", "NativeDropout", "NativeLayerNorm", "Neg", "NllLoss", "NllLoss2D"),
    *("Permute", "Relu", "Reshape", "Sigmoid", "Silu", "SmoothL1Loss", "Softmax", "Sub", "Sum", "Squeeze", "T", "Tanh"),
    *("ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
)
_LEAN_NAMES = {f"{name}Backward{number}" for name in _LEAN for number in range(3)}


@dataclass(slots=True)
class _Known:
    """A tensor that a unit returned or was given.

    Attributes:
        node: Its node, which must not make room for another one of the same id.
        since: The first call during whose backward its gradient may wait already.
        spec: What it looks like.
        around: The module in whose code it was.
        is_made: Whether a unit returned it.
        is_reached: Whether a later call takes it, or something made of it.
        until: The last call during whose backward its gradient waits; None: it does not wait.
    """

    node: Any
    since: int
    spec: TensorSpec
    around: str
    is_made: bool
    is_reached: bool = False
    until: int | None = None


class _Tensor(NamedTuple):
    """A tensor that own code keeps, with the bytes of its storage."""

    spec: TensorSpec
    size_bytes: int

    def line(self, rows: int) -> Line:
        return self.spec.line(rows).scaled(self.size_bytes / max(1, self.spec.size_bytes))


class OwnCodeTracker:
    """Told by a recording of what happens, it knows in the end what own code keeps.

    Where hooks of user code decide what autograd keeps, as in activation checkpointing, nothing is read: it would run
    these hooks.

    Args:
        module: The model.

    Attributes:
        modules: Names of the modules around, innermost last.
        is_known: Whether the graph could be read so far.
        has_end: Whether the graph of the loss was seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules: list[str] = []
        self.is_known = True
        self.has_end = False
        self._constant = {_storage(t) for t in (*module.parameters(), *module.buffers())}
        self._units: list[str] = []
        self._known: dict[int, _Known] = {}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # nodes and storages, so that no other takes the place of one
        self._kept: defaultdict[tuple[str, int], dict[int, _Tensor]] = defaultdict(dict)
        self._moments: defaultdict[tuple[str, int], list[tuple[tuple[TensorSpec, float], ...]]] = defaultdict(list)
        self._maker: dict[int, str] = {}
        self._takers: defaultdict[int, set[str]] = defaultdict(set)

    def take(self, unit: str, inputs: Iterable[Tensor]) -> None:
        """A unit is called."""
        inputs = tuple(inputs)
        self._look(inputs)
        for tensor in inputs:
            self._takers[_storage(tensor)].add(unit)
            self._add(tensor, len(self._units), is_made=False)
        self._units.append(unit)

    def make(self, unit: str, outputs: Iterable[Tensor]) -> None:
        """A unit returns, or a module without parameters that follows it in a chain."""
        for tensor in outputs:
            self._maker[_storage(tensor)] = unit
            self._add(tensor, len(self._units), is_made=True)

    def leave_module(self, outputs: Iterable[Tensor]) -> None:
        """The forward of a module with units below it ends."""
        self._look(outputs)
        self.modules.pop()

    def end(self, outputs: Iterable[Tensor]) -> None:
        """User code is done: what it returns is the loss."""
        self.modules.clear()
        self._look(outputs)
        self.has_end = self.is_known

    def forget(self) -> None:
        """Let go of the graph. Only `code`, `in_the_end` and `waiting` are asked from now on."""
        for known in self._known.values():
            known.node = None
        self._alive.clear()

    def code(self, rows: int) -> tuple[OwnCode, ...]:
        """What own code keeps between units, in the order of calls."""
        if not self.is_known:
            return ()
        places = dict.fromkeys((*self._kept, *self._moments))
        return tuple(self._code(place, rows) for place in places if not self._is_last(place))

    def in_the_end(self, rows: int) -> OwnCode | None:
        """What the loss keeps and needs; None if its graph was not seen."""
        return self._code((OWN_CODE, len(self._units) - 1), rows) if self.has_end and self.is_known else None

    def waiting(self, rows: int) -> tuple[Waiting, ...]:
        """Gradients that wait while backwards of units run."""
        last = len(self._units) - 1
        found = []
        for known in self._known.values():
            until = known.until
            if not self.has_end and known.is_made and not known.is_reached:
                until = last  # nobody saw how the loss is made of what is left
            if until is not None and known.since <= until:
                found.append(
                    Waiting(
                        around=known.around,
                        source=self._units[known.since - 1] if known.is_made else OWN_CODE,
                        first=self._units[known.since],
                        last=self._units[until],
                        size_bytes=known.spec.line(rows),
                    )
                )
        return tuple(found)

    # ------------------------------------------------------------------------------------ the graph

    def _add(self, tensor: Tensor, since: int, *, is_made: bool) -> None:
        self._alive.append(tensor.untyped_storage())
        node = tensor.grad_fn
        if node is not None and id(node) not in self._known:
            self._known[id(node)] = _Known(node, since, TensorSpec.of(tensor), self._around, is_made)

    @property
    def _around(self) -> str:
        return self.modules[-1] if self.modules else OWN_CODE

    def _look(self, tensors: Iterable[Tensor]) -> None:
        """Go down from tensors to those that units made or took before, whose gradients wait from then on."""
        self.is_known = self.is_known and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        if not self.is_known:
            return
        call = len(self._units)
        ahead: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        new = 0
        while ahead and new < _MOST_NODES:
            node = ahead.pop()
            known = self._known.get(id(node))
            if known is not None:
                known.is_reached = True
                known.until = call - 1
            elif id(node) not in self._seen:
                new += 1
                self._seen.add(id(node))
                self._alive.append(node)
                self._note(node, (self._around, call - 1))
                ahead += [before for before, _ in node.next_functions if before is not None]

    def _note(self, node: Any, place: tuple[str, int]) -> None:
        for tensor in _saved_by(node):
            key = _storage(tensor)
            if key not in self._constant and not any(key in kept for kept in self._kept.values()):
                self._alive.append(tensor.untyped_storage())
                self._kept[place][key] = _Tensor(TensorSpec.of(tensor), tensor.untyped_storage().nbytes())
        taken = [spec for before, at in node.next_functions if before is not None for spec in _outputs_of(before, at)]
        given = [spec for spec in _outputs_of(node) if spec.shape]
        more = () if node.name() in _LEAN_NAMES else (max((*taken, *given), key=_size, default=None),)
        self._moments[place].append(
            (*((spec, 1.0) for spec in (*given, *taken)), *((spec, 2.0) for spec in more if spec is not None))
        )

    # ------------------------------------------------------------------------------------ what was found

    def _is_last(self, place: tuple[str, int]) -> bool:
        return place == (OWN_CODE, len(self._units) - 1)

    def _code(self, place: tuple[str, int], rows: int) -> OwnCode:
        around, call = place
        moments = [sum((spec.line(rows).scaled(n) for spec, n in each), Line()) for each in self._moments[place]]
        # Of one maker and the same takers, all together.
        sizes: defaultdict[tuple[str, tuple[str, ...]], Line] = defaultdict(Line)
        for key, tensor in self._kept[place].items():
            takers = tuple(sorted(self._takers[key])) if key in self._takers else ()
            sizes[self._maker.get(key, OWN_CODE), takers] += tensor.line(rows)
        return OwnCode(
            around=around,
            after=self._units[call] if call >= 0 else OWN_CODE,
            kept=tuple(Kept(source=s, taken_by=takers, size_bytes=size) for (s, takers), size in sizes.items()),
            moment_bytes=max(moments, key=lambda size: size(rows), default=Line()),
        )


def largest_moment(handed: Iterable[Line], rows: int) -> Line:
    """What own code may need for a moment that nobody saw, by what it is handed."""
    return max(handed, key=lambda size: size(rows), default=Line()).scaled(_LARGEST_MOMENT)


def _saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that a node keeps."""
    names = [name for name in dir(node) if name.startswith("_saved_")] or ["saved_tensors"]
    for name in names:
        try:
            value = getattr(node, name, None)
        except RuntimeError:  # changed in place since, or let go of already
            continue
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor):
                yield item


def _outputs_of(node: Any, at: int | None = None) -> list[TensorSpec]:
    """What the outputs of a node's forward looked like, or one of them."""
    outputs = node._input_metadata if at is None else node._input_metadata[at : at + 1]
    return [TensorSpec(tuple(map(int, each.shape)), each.dtype, True) for each in outputs if each.dtype is not None]


def _size(spec: TensorSpec) -> int:
    return spec.size_bytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
