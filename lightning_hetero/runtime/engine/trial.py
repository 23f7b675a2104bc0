"""Whether a region may be cut into micro-batches, found out by a trial on the first real batch.

A region may be cut only if that changes nothing: each row of the output depends on the same row of the input. The
trial runs the region as it is, in two parts, and with other rows beside the same ones, and compares outputs; then it
compares the gradients of a few rows, also where nobody asks for gradients: a gate that is zero hides a coupling. It
leaves no trace: random generators, buffers, attributes and the modes of modules are put back.

What a comparison of numbers cannot show is looked for in other ways: values read into Python (`if h.sum() > 0`), state
that is changed, hooks of user code that would see parts of a batch.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.containers import Contents, are_unchanged, contents
from lightning_hetero.runtime.engine.batch import Cut, Join, candidates, joined, offsets, size_of
from lightning_hetero.runtime.engine.batch_norm import Deferred, can_defer, uses_batch
from lightning_hetero.runtime.engine.comparison import close, is_finite, same, with_other_rows
from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.evaluating import evaluating, uncompiled
from lightning_hetero.runtime.engine.gradient_trial import GradientTrial
from lightning_hetero.runtime.engine.meanwhile import Meanwhile
from lightning_hetero.runtime.engine.names import asks_for_gradients
from lightning_hetero.runtime.engine.observer import Observer, Read
from lightning_hetero.runtime.engine.overlap import have_overlap
from lightning_hetero.runtime.engine.owned import Owned
from lightning_hetero.runtime.engine.readings import Readings
from lightning_hetero.runtime.engine.refused import methods_refused
from lightning_hetero.runtime.engine.snapshot import Snapshot
from lightning_hetero.runtime.engine.sources import OtherSources
from lightning_hetero.runtime.engine.state import saves_otherwise
from lightning_hetero.runtime.engine.steady import Steady
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.verdict import Verdict
from lightning_hetero.runtime.engine.views import parts_of_others
from lightning_hetero.runtime.engine.watch import Watch, has_hooks
from lightning_hetero.runtime.transfer import version_of

Run = Callable[..., Any]

ONE_ROW = "the batch has one row"
_COUPLED = "its rows depend on each other"


class Trial:
    """Runs a region as it is and in parts.

    Args:
        module: The region.
        run: Runs it whole, in connected mode.
        generators: The default generators of all devices of the plan.
        forbidden: Names of methods, such as `log`, that must be called once per batch only.
        watch: To which units report.
        split: Says into how many rows each a batch of some rows is cut.
        defers: Whether batch normalisations may use the statistics of micro-batches.
        root: The model that has these methods, if it is another module than the region.
    """

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        generators: Generators,
        forbidden: Sequence[str],
        watch: Watch,
        split: Callable[[int], list[int]],
        defers: bool = False,
        root: nn.Module | None = None,
    ) -> None:
        self._module = module
        self._run = run
        self._built: Contents = []  # containers among the inputs of the last run
        self._generators = generators
        self._forbidden = forbidden
        self._callers = [module] if root is None or root is module else [module, root]
        self._watch = watch
        self._split = split
        self._defers = defers
        self._own = {id(part) for part in _own_modules(module)}
        self._owned = Owned(())
        self._in_between: str | None = None  # what was changed at some moment
        self._saves_otherwise = False
        self._is_steady = False  # whether runs are compared
        self._records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self._traced: tuple[int, ...] | None = None
        self._upstream: tuple[int, ...] = ()
        self._views: tuple[tuple[int, int], ...] = ()

    def verdict(self, args: tuple[Any, ...], kwargs: dict[str, Any], precision: Sequence[torch.dtype]) -> Verdict:
        """Find out.

        Args:
            args: Inputs of the region, left as they are.
            kwargs: Likewise.
            precision: Dtypes that autocast computes in.
        """
        given = Tree((args, kwargs))
        cuts = candidates(given.tensors)
        worth = [cut for cut in cuts if (cut.rows(given.tensors) or 0) > 1]
        if given.opaque is not None:
            return Verdict(None, f"it is called with a {type(given.opaque).__name__}, which cannot be cut")
        if not worth:
            return Verdict(None, ONE_ROW, final=False) if cuts else Verdict(None, "none of its inputs is a batch")
        states, others = self._generators.states(), OtherSources()
        drawn_from = [(each, each.get_state()) for each in given.values if isinstance(each, torch.Generator)]
        reached = [self._module, *(each for each in given.values if isinstance(each, nn.Module))]
        norms = [module for each in reached for module in each.modules() if uses_batch(module)]
        with methods_refused(self._callers, self._forbidden) as refused, Deferred(norms).untouched():
            snapshot = Snapshot(self._module, given.values)
            reason = self._visible_reason(snapshot)
            if reason is not None:
                return Verdict(None, reason)
            self._owned = Owned(snapshot.parameters())
            try:
                found = self._try(given, worth, snapshot, norms, precision)
            except CannotCutError as error:
                found = Verdict(None, str(error))
            except Exception as error:  # if it is not the trial's fault, the run that counts raises it again
                found = Verdict(None, f"a trial run of it failed ({type(error).__name__}: {error})", final=False)
            finally:
                self._generators.restore(states)
                for generator, state in drawn_from:
                    generator.set_state(state)
                drawn = others.put_back()
                self._owned.put_back()
                with torch.no_grad():
                    change = snapshot.put_back()
        if refused:
            return Verdict(None, f"its forward calls self.{refused[0]}, which has to happen once for a batch")
        if drawn is not None:
            return Verdict(None, f"it {drawn}", final=False)  # perhaps it was another thread
        if change is not None:
            return Verdict(None, f"its forward {change}", final=False)
        if self._in_between is not None:
            return Verdict(None, f"its forward {self._in_between} for a while")
        return found

    def _visible_reason(self, snapshot: Snapshot) -> str | None:
        for name, module in snapshot.modules:
            if uses_batch(module) and not (self._defers and can_defer(module)):
                return f"{name or 'it'} ({type(module).__name__}) uses the mean and variance of the whole batch"
            if getattr(module, "scale_grad_by_freq", False) and self._records:
                return f"{name or 'it'} ({type(module).__name__}) scales gradients by how often the batch has a row"
            # Hooks of a region are called around it; those of a unit, which a module with replicas is, within it.
            if (module is not self._module or _is_unit(module)) and has_hooks(module):
                return f"{name or 'it'} has hooks of user code, which would see parts of a batch"
        if (iterator := snapshot.iterator_used()) is not None:
            return f"its forward uses {iterator}, which cannot be put back after a trial"
        if snapshot.of_thread is not None:
            return f"its code uses {snapshot.of_thread}, whose value each thread has for itself"
        if snapshot.sets_numbers_back():
            return "its code sets random numbers of Python or NumPy back"
        return None

    def _try(
        self,
        given: Tree,
        cuts: Sequence[Cut],
        snapshot: Snapshot,
        norms: Sequence[nn.Module],
        precision: Sequence[torch.dtype],
    ) -> Verdict:
        # Copies: a module may change its inputs in place, and a trial must not.
        tensors = [tensor.detach().clone() for tensor in given.tensors]
        with (
            frames.random_numbers_arranged(),
            frames.activations_kept(),
            uncompiled(),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the run that counts says it again
            meanwhile = Meanwhile(snapshot.modules, (), snapshot.inside(), snapshot.names, beside=True)
            observer = self._observer(tensors, snapshot, meanwhile)
            reason, whole = self._observe(given, tensors, observer, snapshot, meanwhile)
            if reason is not None:
                return Verdict(None, reason)
            # Without statistics of the batch and with constant random numbers: these are no sign of a coupling.
            self._is_steady = True
            with evaluating(norms):
                if norms or self._watch.any:
                    whole = self._call(given, tensors)
                found = self._choose(given, tensors, cuts, whole, observer, snapshot, precision)
        return self._with_readings(found, observer, cuts, tensors, snapshot)

    def _choose(
        self,
        given: Tree,
        tensors: list[Tensor],
        cuts: Sequence[Cut],
        whole: Any,
        observer: Observer,
        snapshot: Snapshot,
        precision: Sequence[torch.dtype],
    ) -> Verdict:
        """The first of the cuts that changes nothing."""
        may_be_far = not (observer.is_picky or any(isinstance(m, torch.jit.ScriptModule) for _, m in snapshot.modules))
        first: str | None = None
        for cut in cuts:
            reason = (
                self._reads_rows(observer, cut)
                or self._coupling(given, tensors, cut, whole, precision, snapshot)
                or self._gradient_coupling(given, tensors, cut, precision, snapshot)
                or (self._coupling_far_away(given, tensors, cut, whole, precision) if may_be_far else None)
            )
            if reason is None and set(self._upstream).intersection(self._traced or ()):
                # Of a loss that sees both, a gradient by the one would lack what goes through the other.
                asking = asks_for_gradients({type(part) for each in self._callers for part in each.modules()})
                if asking is not None:
                    reason = f"one of its outputs is made of another, and {asking} may ask for a gradient by that"
            if reason is None:
                return Verdict(
                    cut,
                    draws=self._watch.any,
                    traced=self._traced,
                    upstream=self._upstream,
                    views=self._views,
                    size=size_of(cut, tensors),
                )
            first = first or reason
        assert first is not None
        return Verdict(None, first)

    def _with_readings(
        self, found: Verdict, observer: Observer, cuts: Sequence[Cut], tensors: Sequence[Tensor], snapshot: Snapshot
    ) -> Verdict:
        """The verdict, for as long as there is the same in what code has read."""
        if found.cut is None and self._reads_rows(observer, cuts[0]):
            return found
        sources = functools.reduce(operator.or_, (read.sources or 0 for read in observer.reads), 0)
        rows = {place for cut in cuts for place in cut.positions} if found.cut is None else set()
        inputs = [(place, tensors[place]) for place in sorted(observer.inputs_of(sources) - rows)]
        constants = observer.constants_of(sources)
        if not (inputs or constants):
            return found
        try:
            return replace(found, readings=Readings([each for _, each in snapshot.modules], constants, inputs))
        except ValueError:
            return found if found.cut is None else Verdict(None, _reads(observer.reads[0]))

    def _observe(
        self, given: Tree, tensors: list[Tensor], observer: Observer, snapshot: Snapshot, meanwhile: Meanwhile
    ) -> tuple[str | None, Any]:
        """Run the region as it is. Why it cannot be cut, as far as that shows; and its output."""
        versions = [version_of(tensor) for tensor in tensors]
        watch = self._watch
        look = snapshot.look()

        def at_border() -> None:
            self._note(look)
            meanwhile.at_border()

        watch.at_border = at_border
        meanwhile.begin()
        with observer:
            whole = self._call(given, tensors)
        watch.end()
        watch.at_border = lambda: None
        if versions != [version_of(tensor) for tensor in tensors]:
            return "it changes its input in place", whole
        if watch.changer is not None:
            return f"{watch.changer} changes its input in place", whole
        if watch.writer is not None:
            return f"{watch.writer} writes into a container that it is given", whole
        if not are_unchanged(self._built):
            return "it writes into a container that it is given", whole
        outputs = Tree(whole).tensors
        self._views = parts_of_others(outputs)  # these are made of the joined ones
        parts = {place for place, _ in self._views}
        if have_overlap([each for place, each in enumerate(outputs) if place not in parts], tensors):
            return "its outputs share memory, with each other or with its inputs", whole
        if (trouble := watch.stray_draws or watch.trouble) is not None:
            return trouble, whole
        if self._owned.written:
            return f"its forward changes the parameter {self._owned.written[0]!r}", whole
        change = snapshot.change_so_far()
        return meanwhile.change if change is None else f"its forward {change}", whole

    def _reads_rows(self, observer: Observer, cut: Cut) -> str | None:
        for read in observer.reads:
            if read.sources is None or not observer.inputs_of(read.sources).isdisjoint(cut.positions):
                return _reads(read)
        return None

    def _coupling(
        self,
        given: Tree,
        tensors: list[Tensor],
        cut: Cut,
        whole: Any,
        precision: Sequence[torch.dtype],
        snapshot: Snapshot,
    ) -> str | None:
        """What tells a part from the same rows of the whole; None if nothing does."""
        rows = cut.rows(tensors) or 0
        expected = Tree(whole)
        first = rows // 3 | 1  # an odd number tears pairs of rows
        for sizes in ([first, rows - first], self._split(rows)):  # and what this batch would be cut into
            bounds = offsets(sizes)
            try:
                parts = [self._call(given, cut.take(tensors, *part)) for part in pairwise(bounds)]
                if (left := _left_by_parts(snapshot)) is not None:
                    return left
                join = Join(list(map(Tree, parts)), sizes)
            except CannotCutError as refused:
                return str(refused)
            except Exception as error:
                return f"it cannot run on a part of the batch ({type(error).__name__}: {error})"
            if not join.has_form_of(expected):
                return "what it returns differs between parts of a batch"
            if not all(close(joined(c), t, precision) for c, t in zip(join.columns, expected.tensors, strict=True)):
                return _COUPLED
        half = rows // 2
        for start, stop in ((0, half), (half, rows)):
            other = Tree(self._call(given, with_other_rows(tensors, cut, start, stop)))
            if not _has_same_rows(other, expected, slice(stop, rows) if start == 0 else slice(0, start), precision):
                return _COUPLED
        return None

    def _coupling_far_away(
        self, given: Tree, tensors: list[Tensor], cut: Cut, whole: Any, precision: Sequence[torch.dtype]
    ) -> str | None:
        """Whether rows depend on others that are much larger: a norm that is clipped is not, in the first batch."""
        rows = cut.rows(tensors) or 0
        half = rows // 2
        try:
            other = Tree(self._call(given, with_other_rows(tensors, cut, 0, half, are_far=True)))
        except Exception:  # code need not take such numbers
            return None
        if not all(map(is_finite, other.tensors)):
            return None
        return None if _has_same_rows(other, Tree(whole), slice(half, rows), precision) else _COUPLED

    def _gradient_coupling(
        self,
        given: Tree,
        tensors: list[Tensor],
        cut: Cut,
        precision: Sequence[torch.dtype],
        snapshot: Snapshot,
    ) -> str | None:
        """What tells gradients of parts from those of the whole; None if nothing does."""

        def run(leaves: Sequence[Tensor]) -> Any:
            with Observer(leaves, (), self._owned, self._note_saving):
                return self._call(given, leaves)

        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        constants = list(_without_statistics(snapshot))
        watch = self._watch
        trial = GradientTrial(
            run,
            given.tensors,
            parameters,
            precision,
            constants,
            records=self._records,
            in_backward=watch.backward,
            is_alone=lambda: not watch.other_backwards(),
        )
        try:
            adds_up = trial.adds_up(tensors, cut, cut.rows(tensors) or 0)
        except CannotCutError as refused:
            return str(refused) if self._records else None
        except Exception:
            if self._records:
                raise
            return None  # what records nothing need not be differentiable
        if not self._records:
            return None if adds_up else _COUPLED
        if watch.called_in_backward is not None:
            # In a lane, its graph would not show its parameters, for which the caller may differentiate.
            return f"the backward of its code calls {watch.called_in_backward}"
        if watch.draws_again is not None:
            return f"{watch.draws_again} draws random numbers under activation checkpointing from outside"
        if trial.draws or watch.drew_in_backward:
            return "its backward draws random numbers"
        if trial.differentiates and watch.called_in_function is not None:
            return f"a function of autograd calls {watch.called_in_function}, and computes gradients itself"
        if trial.accumulates:
            return "code of its backward adds to gradients of parameters by itself"
        self._traced, self._upstream = trial.traced, trial.upstream
        if self._saves_otherwise and self._watch.own_code:
            return "its code draws random numbers under activation checkpointing"
        return None if adds_up else "the gradients of its rows depend on each other"

    def _call(self, given: Tree, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = given.build(tensors)
        self._built = contents((args, *kwargs.values()))
        with Steady() if self._is_steady else nullcontext():
            return self._run(*args, **kwargs)

    def _observer(self, tensors: Sequence[Tensor], snapshot: Snapshot, meanwhile: Meanwhile) -> Observer:
        look = snapshot.look(self._own)

        def at_operation() -> None:
            self._note(look)
            if self._watch.in_unit:
                meanwhile.look_at_what_all_have()
            else:
                meanwhile.look()

        return Observer(tensors, snapshot.tensors(), self._owned, at_operation)

    def _note(self, look: Callable[[], str | None]) -> None:
        if self._in_between is None:
            self._in_between = look()

    def _note_saving(self) -> None:
        self._watch.note_saving()
        self._saves_otherwise = self._saves_otherwise or (saves_otherwise() and not self._watch.in_unit)


def _left_by_parts(snapshot: Snapshot) -> str | None:
    """What the last part has left behind, such as its number of rows; the whole may leave what was there before."""
    # Normalisations have another mode for as long as outputs are compared.
    others = {id(module) for _, module in snapshot.modules if not isinstance(module, _NormBase)}
    change = snapshot.change_so_far(others)
    return None if change is None else f"its forward {change}"


def _reads(read: Read) -> str:
    return f"its code reads the content of a tensor ({read.function})"


def _has_same_rows(other: Tree, expected: Tree, kept: slice, precision: Sequence[torch.dtype]) -> bool:
    """Whether two outputs have the same in some rows."""
    return other.form == expected.form and all(
        a.shape == b.shape and same(a[kept], b[kept], precision)
        for a, b in zip(other.tensors, expected.tensors, strict=True)
    )


def _without_statistics(snapshot: Snapshot) -> Iterator[Tensor]:
    """The tensors that modules have, without running statistics: torch does not differentiate by these."""
    statistics = {
        id(buffer) for _, module in snapshot.modules if isinstance(module, _NormBase) for buffer in module.buffers()
    }
    yield from (tensor for tensor in snapshot.tensors() if id(tensor) not in statistics)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those below it that are in no unit: their code runs in lanes."""
    yield module
    for child in module.children():
        if not _is_unit(child):
            yield from _own_modules(child)


def _is_unit(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("_compiled_call_impl"), "parts")
