"""Comparison of the gradients of a few rows with the sums of those of their parts.

Outputs may agree while gradients do not: a gate that is zero at first hides a coupling, and a custom backward may have
one of its own. A gate may be a buffer, too, or a state for each row that is zero at first. So what the module has and
does not train gets a gradient for as long as the trial takes, and so does what is looked up by whole numbers: of equal
tokens, gradients may add up to nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime.engine.batch import Cut
from lightning_hetero.runtime.engine.comparison import STEPS, as_real
from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.leaves import gradients, walk
from lightning_hetero.runtime.engine.silence import SILENCE
from lightning_hetero.runtime.engine.steady import Steady
from lightning_hetero.runtime.engine.tree import Tree

Run = Callable[[Sequence[Tensor]], Any]  # from the tensors among the inputs to the output

_MOST_ROWS = 4  # rows whose gradients are compared
_MOST_BYTES = 1 << 30  # of gradients at once
_SKETCH = 1 << 12  # elements of a gradient that are compared
_TRIES = 3  # with other rows each time
_LOOKING_UP = frozenset({"double", "embedding", "float", "half", "to", "type"})
_KINK = 0.03  # of a gradient: how far one activation at a kink may throw it off


class GradientTrial:
    """Differentiates a module for a few rows, whole and in parts.

    Args:
        run: Runs the module.
        given: The tensors among its inputs, as user code gave them.
        parameters: The parameters of the module that need a gradient.
        precision: Dtypes that autocast computes in.
        constants: Other tensors that the module has: buffers, frozen parameters, tensors in attributes.
        records: Whether gradients are recorded in the call of user code.
        in_backward: What backwards are to run in.
        is_alone: Whether there is no other backward now. All have the same thread for an accelerator.

    Attributes:
        traced: Places of the outputs that have a graph in the call of user code, once `adds_up` was called.
        upstream: Places of those of which other outputs are made, likewise.
        accumulates: Whether code of a backward adds to `grad` of parameters by itself.
        draws: Whether it draws random numbers.
        differentiates: Whether it computes gradients itself.
    """

    def __init__(
        self,
        run: Run,
        given: Sequence[Tensor],
        parameters: Sequence[Tensor],
        precision: Sequence[torch.dtype],
        constants: Iterable[Tensor] = (),
        *,
        records: bool = True,
        in_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
        is_alone: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run = run
        self._given = given
        self._parameters = parameters
        self._precision = precision
        self._constants = [tensor for tensor in constants if _may_have_gradient(tensor)]
        self._lent: frozenset[int] = frozenset()  # `id` of those that have a gradient now
        self._adds_leaves = False
        self._records = records
        self._in_backward = in_backward
        self._is_alone = is_alone
        self.traced: tuple[int, ...] = ()
        self.upstream: tuple[int, ...] = ()
        self.accumulates = False
        self.draws = False
        self.differentiates = False

    def adds_up(self, tensors: Sequence[Tensor], cut: Cut, rows: int) -> bool:
        """Whether the gradients of the rows are the sums of those of the parts.

        An activation that is zero but for rounding may be above zero in the whole and below in a part (ReLU), which
        changes gradients a little. So after a small difference other rows of the batch are tried: a coupling of rows
        shows with them, too.

        Args:
            tensors: Copies of the inputs.
            cut: Which of them are cut.
            rows: Rows of the batch.

        Raises:
            CannotCutError: All runs share a graph: some tensor comes into the module by another way than its inputs.
        """
        with torch.inference_mode(False):
            tensors = [tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]
            # Not everything may have a gradient, such as statistics of a normalisation.
            with suppress(Exception), self._lending():
                return self._adds_up(tensors, cut, rows)
            return self._adds_up(tensors, cut, rows)

    def _adds_up(self, tensors: Sequence[Tensor], cut: Cut, rows: int) -> bool:
        for start in range(0, _TRIES * _MOST_ROWS, _MOST_ROWS):
            count = min(rows - start, _MOST_ROWS)
            if start and count < 2:
                return False
            error = self._error(tensors, cut, start, count)
            if error == 0.0 or error > _KINK:
                return error == 0.0
        return False

    @contextmanager
    def _lending(self) -> Iterator[None]:
        """Within the block the constants have gradients, and what is looked up."""
        try:
            self._adds_leaves = True
            for tensor in self._constants:
                tensor.requires_grad_(True)
            self._lent = frozenset(map(id, self._constants))
            yield
        finally:
            self._lent = frozenset()
            self._adds_leaves = False
            for tensor in self._constants:
                tensor.requires_grad_(False)

    def _error(self, tensors: Sequence[Tensor], cut: Cut, start: int, rows: int) -> float:
        """How far the sums of parts are from the gradients of some rows, relative to these; 0 up to rounding."""
        with torch.enable_grad(), _without_cached_casts():
            head, tail, whole = (
                _Run(self._run, cut.take(tensors, start + a, start + b), self._adds_leaves, self._is_alone)
                for a, b in ((0, 1), (1, rows), (0, rows))
            )
            if not head.nodes.isdisjoint(tail.nodes):
                raise CannotCutError("it uses a tensor with a graph that is not one of its inputs")
            self._note_traced(whole)
            known = {id(leaf) for leaf in (*whole.inputs, *whole.added)}
            reached = [*whole.leaves, *(leaf for leaf in (*head.leaves, *tail.leaves) if id(leaf) in self._lent)]
            leaves = {id(leaf): leaf for leaf in (*self._parameters, *reached) if id(leaf) not in known}
            with self._in_backward():
                parts = [run.gradients([*leaves.values()], first, rows) for run, first in ((head, 0), (tail, 1))]
                expected = whole.gradients([*leaves.values()], 0, rows)
            self.accumulates = self.accumulates or any(run.accumulates for run in (head, tail, whole))
            self.draws = self.draws or any(run.draws for run in (head, tail, whole))
            self.differentiates = self.differentiates or any(run.differentiates for run in (head, tail, whole))
        found = [
            torch.cat([a, b]) if place in cut.positions and a.dim() else a + b
            for place, (a, b) in enumerate(zip(*parts, strict=True))
        ]
        is_lent = [id(leaf) in self._lent for leaf in (*whole.inputs, *leaves.values())]
        added = list(_joined(head.of_added, tail.of_added, whole.of_added))
        found += [joined for joined, _ in added]
        expected += [gradient for _, gradient in added]
        return self._distance(found, expected, is_lent + [True] * len(added))

    def _note_traced(self, whole: _Run) -> None:
        needed = {id(leaf) for leaf, given in zip(whole.inputs, self._given, strict=True) if not given.requires_grad}
        needed |= self._lent.union(map(id, whole.added))
        self.traced = tuple(
            place
            for place, output in whole.outputs
            if any(id(leaf) not in needed for leaf in walk([output])[1])
            or (output.is_leaf and id(output) not in needed)
        )
        graphs = [(output.grad_fn, walk([output])[2]) for _, output in whole.outputs]
        self.upstream = tuple(
            place
            for place, output in whole.outputs
            if output.grad_fn is not None
            and any(output.grad_fn in nodes for last, nodes in graphs if last is not output.grad_fn)
        )

    def _distance(self, found: Sequence[Tensor], expected: Sequence[Tensor], lent: Sequence[bool]) -> float:
        dtypes = {leaf.dtype for leaf in (*self._parameters, *self._given) if leaf.is_floating_point()}
        step = max(torch.finfo(dtype).eps for dtype in (torch.float64, *dtypes, *self._precision))
        pairs = [
            # Nobody may ever ask for these, and that of a root is infinite at zero.
            _where_finite(a, b) if is_lent or not self._records else (a, b)
            for a, b, is_lent in zip(found, expected, lent, strict=True)
        ]
        sizes = [float(b.abs().max()) if b.numel() else 0.0 for _, b in pairs]
        # A gradient may be nothing but rounding, as that of a bias before a softmax: so the others count, too. Those
        # that user code does not ask for may be huge, and must not hide the others.
        factor = min(STEPS * step, step**0.5)
        noise_of_all = factor * max(sizes, default=0.0)
        noise = factor * max((size for size, is_lent in zip(sizes, lent, strict=True) if not is_lent), default=0.0)
        farthest = 0.0
        for (a, b), size, is_lent in zip(pairs, sizes, lent, strict=True):
            distance = (a - b).abs()
            if not bool((distance <= step**0.5 * size + (noise_of_all if is_lent else noise)).all()):
                relative = float(distance.max()) / size if size else math.inf
                farthest = max(farthest, math.inf if math.isnan(relative) else relative)
        return farthest


class _Run:
    """One forward with a graph.

    Attributes:
        inputs: The inputs, as leaves.
        outputs: Places and outputs that have a graph.
        leaves: The leaves that these depend on.
        nodes: The inner nodes of their graph.
        added: Leaves that were added to what was looked up.
        of_added: Their gradients.
        accumulates: Whether code of a backward has added to `grad` of leaves by itself.
        draws: Whether it draws random numbers.
        differentiates: Whether it computes gradients itself.
    """

    def __init__(self, run: Run, tensors: Sequence[Tensor], adds_leaves: bool, is_alone: Callable[[], bool]) -> None:
        self._is_alone = is_alone
        self.inputs = [t.detach().requires_grad_() if t.is_floating_point() or t.is_complex() else t for t in tensors]
        adding = _AddedLeaves()
        with adding if adds_leaves else nullcontext():
            outputs = Tree(run(self.inputs)).tensors
        self.added = adding.leaves
        self.of_added: list[Tensor] = []
        self.accumulates = False
        self.draws = False
        self.differentiates = False
        self.outputs = [(place, output) for place, output in enumerate(outputs) if output.requires_grad]
        _, self.leaves, self.nodes = walk([output for _, output in self.outputs])

    def gradients(self, leaves: Sequence[Tensor], start: int, rows: int) -> list[Tensor]:
        """Of each gradient as much as is compared: first those of the inputs, then those of other leaves."""
        whole = set(map(id, (*self.inputs, *self.added)))
        wanted = [leaf for leaf in (*self.inputs, *self.added, *leaves) if leaf.requires_grad]
        groups = list(_groups(wanted)) if self.outputs else []
        outputs = [output for _, output in self.outputs]
        given = [_direction(output, place, start, rows) for place, output in self.outputs]
        found: dict[int, Tensor] = {}
        with _without_hooks(leaves), self._undone(leaves):
            for number, group in enumerate(groups, 1):
                with Steady() as steady:  # activation checkpointing runs the forward again
                    result = gradients(outputs, given, group, keep_graph=number < len(groups))
                self.draws = self.draws or steady.drew
                self.differentiates = self.differentiates or steady.differentiated
                for leaf, gradient in zip(group, result, strict=True):
                    if gradient is not None:
                        found[id(leaf)] = _whole(gradient) if id(leaf) in whole else _sketch(gradient)
        zeros = {id(leaf): _whole(torch.zeros_like(leaf)) for leaf in (*self.inputs, *self.added) if leaf.requires_grad}
        self.of_added = [found.get(id(leaf), zeros[id(leaf)]) for leaf in self.added]
        nothing = torch.zeros((), device="cpu", dtype=torch.float64)
        return [found.get(id(leaf), zeros.get(id(leaf), nothing)) for leaf in (*self.inputs, *leaves)]

    @contextmanager
    def _undone(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Put back what code of a backward within the block adds to `grad` of leaves; others may do so meanwhile."""
        thread = threading.get_ident()
        before: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}

        def look(leaf: Tensor) -> None:
            if threading.get_ident() != thread and (leaf.is_cpu or not self._is_alone()):
                return
            self.accumulates = True
            if id(leaf) not in before:
                before[id(leaf)] = leaf, leaf.grad, None if leaf.grad is None else leaf.grad.clone()

        # Nodes that accumulate: a backward that is asked for gradients of leaves does not come to them.
        nodes = [(leaf, get_gradient_edge(leaf).node) for leaf in leaves if leaf.requires_grad and leaf.is_leaf]
        hooks = [node.register_prehook(lambda _, leaf=leaf: look(leaf)) for leaf, node in nodes]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for leaf, gradient, content in before.values():
                leaf.grad = gradient
                if gradient is not None and content is not None:
                    gradient.copy_(content)


class _AddedLeaves(TorchFunctionMode):
    """While active, leaves of zeros are added to the real numbers that are made of whole ones, as by an embedding.

    Attributes:
        leaves: The leaves, in the order of operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and add a leaf to what it has looked up."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in _LOOKING_UP or not torch.is_grad_enabled():
            return result
        given = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)]
        if not (isinstance(result, Tensor) and result.is_floating_point() and any(map(_is_whole_numbers, given))):
            return result
        leaf = torch.zeros_like(result, requires_grad=True)
        self.leaves.append(leaf)
        return result + leaf


def _is_whole_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _joined(head: Sequence[Tensor], tail: Sequence[Tensor], whole: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of added leaves: those of both parts together, and those of the whole."""
    if not len(head) == len(tail) == len(whole):
        return
    for a, b, expected in zip(head, tail, whole, strict=True):
        if a.dim() and a.shape[1:] == b.shape[1:] == expected.shape[1:]:
            if len(a) + len(b) == len(expected):
                yield torch.cat([a, b]), expected
            elif len(a) == len(b) == len(expected):  # something that all rows share, such as positions
                yield a + b, expected


def _groups(leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The leaves, no more at once than memory can be spared for their gradients."""
    group: list[Tensor] = []
    size_bytes = 0
    for leaf in leaves:
        leaf_bytes = leaf.numel() * leaf.element_size()
        if group and size_bytes + leaf_bytes > _MOST_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(leaf)
        size_bytes += leaf_bytes
    if group:
        yield group


def _direction(output: Tensor, place: int, start: int, rows: int) -> Tensor:
    """A gradient for the rows of an output from `start` on: no two elements alike, each row as it is in the whole."""
    count = rows * output[:1].numel()
    numbers = torch.arange(1 + place, 1 + place + count, device="cpu", dtype=torch.float64).mul(1.7).sin() + 2
    part = numbers.reshape(rows, *output.shape[1:])[start : start + len(output)]
    return part.to(device=output.device, dtype=output.dtype)


def _whole(gradient: Tensor) -> Tensor:
    return as_real(gradient.detach()).double().cpu()


def _sketch(gradient: Tensor) -> Tensor:
    if not gradient.numel():
        return torch.zeros((), device="cpu", dtype=torch.float64)
    if gradient.is_sparse:
        return gradient._values().sum(0).double().cpu()  # which rows it has differs between parts, the sum does not
    flat = as_real(gradient.detach()).flatten()
    return flat[:: -(-flat.numel() // _SKETCH)].double().cpu()


def _may_have_gradient(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not is_plain or tensor.is_inference() or tensor.is_meta or tensor.requires_grad:
        return False
    return tensor.is_floating_point() or tensor.is_complex()


def _where_finite(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    kept = expected.isfinite()
    return (found, expected) if found.shape != expected.shape or bool(kept.all()) else (found[kept], expected[kept])


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    SILENCE.begin(leaves)
    try:
        yield
    finally:
        SILENCE.end(leaves)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Within the block, autocast casts weights anew at every use: a cast that is kept is a graph that runs share."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
