"""Whether a region may be cut into micro-batches, found out by a trial on the first real batch.

A region may be cut only if that changes nothing: each row of the output depends on the same row of the input. The
trial runs the region once as it is and once in two parts, without gradients, and compares. It leaves no trace: random
generators, buffers, attributes and the modes of modules are put back.

What a comparison of numbers cannot show is looked for in other ways: values read into Python (`if h.sum() > 0`), state
that is changed, hooks of user code that would see parts of a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.engine.batch import Cut, Join, candidates, joined
from lightning_hetero.runtime.engine.batch_norm import Deferred, can_defer, uses_batch
from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.snapshot import Snapshot
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import version_of

Run = Callable[..., Any]

# Functions that turn the content of a tensor into something that Python decides by.
_READS = frozenset(
    {
        "__bool__",
        "__int__",
        "__float__",
        "__complex__",
        "__index__",
        "__contains__",
        "__array__",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "numpy",
        "tolist",
    }
)
# Hooks that run when the module is called, or that see its gradients.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


ONE_ROW = "the batch has one row"


@dataclass(frozen=True)
class Verdict:
    """What the trial found.

    Attributes:
        cut: Where to cut; None if the region has to run whole.
        reason: Why it has to run whole, in words that follow "because".
        draws: Whether the region draws random numbers.
    """

    cut: Cut | None
    reason: str = ""
    draws: bool = False


class Watch:
    """Sees, during a trial, who draws random numbers (units, or the code between them), and who changes its inputs.

    Args:
        generators: The default generators of all devices of the plan.

    Attributes:
        units: The units that drew.
        own_code: Whether the region's own code did.
        changer: Name of a unit that changed its input in place; None if none did.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self._states = generators.states()
        self._depth = 0
        self._over = False
        self.units: list[Watched] = []
        self.own_code = False
        self.changer: str | None = None

    @contextmanager
    def unit(self, unit: Watched, inputs: Any) -> Iterator[None]:
        """What is drawn within the block is drawn by `unit`, or by the unit around it."""
        if self._over or self._depth:
            yield
            return
        self.own_code = self._drawn() or self.own_code
        self._depth += 1
        tensors = Tree(inputs).tensors
        versions = [version_of(tensor) for tensor in tensors]
        try:
            yield
        finally:
            self._depth -= 1
            if self._drawn():
                self.units.append(unit)
            if versions != [version_of(tensor) for tensor in tensors]:
                self.changer = unit.name

    def end(self) -> None:
        """Watch no more: what follows is done for comparison only."""
        self.own_code = self._drawn() or self.own_code
        self._over = True

    @property
    def any(self) -> bool:
        """Whether anybody draws."""
        return self.own_code or bool(self.units)

    def _drawn(self) -> bool:
        drawn = self._generators.drawn_since(self._states)
        if drawn:
            self._states = self._generators.states()
        return drawn


class Watched(Protocol):
    """A unit, as far as a trial goes."""

    name: str
    draws: bool


class _Reads(TorchFunctionMode):
    """Notes functions that read a tensor's content into Python."""

    name = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            self.name = name
        return func(*args, **(kwargs or {}))


class Trial:
    """Runs a region as it is and in parts.

    Args:
        module: The region.
        run: Runs it whole, in connected mode.
        generators: The default generators of all devices of the plan.
        forbidden: Names of methods of the module, such as `log`, that must be called once per batch only.
        watch: To which units report.
        defers: Whether batch normalisations may use the statistics of micro-batches.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        generators: Generators,
        forbidden: Sequence[str],
        watch: Watch,
        defers: bool = False,
    ) -> None:
        self._module = module
        self._run = run
        self._generators = generators
        self._forbidden = forbidden
        self._watch = watch
        self._defers = defers

    def verdict(self, args: tuple[Any, ...], kwargs: dict[str, Any], precision: Sequence[torch.dtype]) -> Verdict:
        """Find out.

        Args:
            args: Inputs of the region, left as they are.
            kwargs: Likewise.
            precision: Dtypes that autocast computes in.
        """
        given = Tree((args, kwargs))
        reason = self._visible_reason(given)
        if reason is not None:
            return Verdict(None, reason)
        snapshot = Snapshot(self._module)
        states = self._generators.states()
        change: str | None = None
        try:
            with (
                _methods_refused(self._module, self._forbidden),
                frames.random_numbers_arranged(),
                torch.no_grad(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # the run that counts says it again
                found = self._try(given, precision)
        except CannotCutError as refused:
            found = Verdict(None, str(refused))
        finally:
            self._generators.restore(states)
            with torch.no_grad():
                change = snapshot.put_back()
        return found if change is None else Verdict(None, f"its forward {change}")

    def _visible_reason(self, given: Tree) -> str | None:
        if given.opaque is not None:
            return f"it is called with a {type(given.opaque).__name__}, which cannot be cut"
        for name, module in self._module.named_modules():
            if uses_batch(module) and not (self._defers and can_defer(module)):
                return f"{name or 'it'} ({type(module).__name__}) uses the mean and variance of the whole batch"
            if module is not self._module and _has_hooks(module):
                return f"{name} has hooks of user code, which would see parts of a batch"
        return None

    def _try(self, given: Tree, precision: Sequence[torch.dtype]) -> Verdict:
        # Copies: a module may change its inputs in place, and a trial must not.
        tensors = [tensor.detach().clone() for tensor in given.tensors]
        versions = [version_of(tensor) for tensor in tensors]
        watch = self._watch
        reads = _Reads()
        norms = [module for module in self._module.modules() if uses_batch(module)]
        with reads, Deferred(norms).untouched():
            whole = self._call(given, tensors)
        watch.end()
        if reads.name:
            return Verdict(None, f"its code reads the content of a tensor ({reads.name})")
        if versions != [version_of(tensor) for tensor in tensors]:
            return Verdict(None, "it changes its input in place")
        if watch.changer is not None:
            return Verdict(None, f"{watch.changer} changes its input in place")
        reason = "none of its inputs is a batch"
        # Without dropout and without statistics of the batch: that they differ is no sign of another coupling.
        quiet = list(self._module.modules()) if watch.any else norms
        with _evaluating(quiet):
            if quiet:
                whole = self._call(given, tensors)
            for cut in candidates(tensors):
                rows = cut.rows(tensors) or 0
                if rows < 2:
                    reason = ONE_ROW if rows == 1 else reason
                    continue
                try:
                    difference = self._difference(given, tensors, cut, rows, whole, precision)
                except CannotCutError as refused:
                    difference = str(refused)
                if difference is None:
                    return Verdict(cut, draws=watch.any)
                reason = difference
        return Verdict(None, reason)

    def _difference(
        self, given: Tree, tensors: list[Tensor], cut: Cut, rows: int, whole: Any, precision: Sequence[torch.dtype]
    ) -> str | None:
        """What tells the parts from the whole; None if nothing does."""
        first = max(1, rows // 3)
        sizes = [first, rows - first]
        try:
            parts = [
                self._call(given, cut.take(tensors, 0, first)),
                self._call(given, cut.take(tensors, first, rows)),
            ]
        except CannotCutError:
            raise
        except Exception as error:
            return f"it cannot run on a part of the batch ({type(error).__name__}: {error})"
        join = Join(parts, sizes)
        expected = Tree(whole)
        if len(expected.tensors) != len(join.columns):
            return "what it returns differs between parts of a batch"
        for column, tensor in zip(join.columns, expected.tensors, strict=True):
            if not _close(joined(column), tensor, precision):
                return "its rows depend on each other"
        return None

    def _call(self, given: Tree, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = given.build(tensors)
        return self._run(*args, **kwargs)


def _close(found: Tensor, expected: Tensor, precision: Sequence[torch.dtype]) -> bool:
    """Whether two results agree in half of the digits that they were computed with: kernels round differently."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return bool(torch.equal(found, expected))
    dtypes = [expected.dtype, *precision]
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    scale = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max()) if expected.numel() else 0.0
    return bool(torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def _has_hooks(module: nn.Module) -> bool:
    return any(not isinstance(hook, Hook) for kind in _HOOKS for hook in getattr(module, kind).values())


@contextmanager
def _methods_refused(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the block, the module's methods of these names refuse the cut instead of doing their work."""

    def refuse(name: str) -> Callable[..., None]:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise CannotCutError(f"its forward calls self.{name}, which has to happen once for a batch")

        return refused

    shadowed = [name for name in names if hasattr(type(module), name) and name not in module.__dict__]
    for name in shadowed:
        module.__dict__[name] = refuse(name)
    try:
        yield
    finally:
        for name in shadowed:
            del module.__dict__[name]


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, the modules are in evaluation mode; by their flag, so that no `train` of user code runs."""
    modes = [(part, part.training) for part in modules]
    try:
        for part, _ in modes:
            _set_mode(part, False)
        yield
    finally:
        for part, mode in modes:
            _set_mode(part, mode)


def _set_mode(module: nn.Module, training: bool) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        module.train(training)  # the flag is in C++
    else:
        module.__dict__["training"] = training
