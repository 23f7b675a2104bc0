"""Follows tensors, by their identity, from the unit that makes them to the unit that takes them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hetero.profile.costs import OWN_CODE, Entering, Flow, Line
from lightning_hetero.profile.handed_on import Given, version


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The description of a tensor."""
        return cls(tuple(map(int, tensor.shape)), tensor.dtype, tensor.requires_grad)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def carries(self, rows: int) -> bool:
        """Whether dim 0 holds the batch's rows, one or several entries for each. Of one row nobody can tell more."""
        if not self.shape or self.shape[0] < rows:
            return False
        return self.shape[0] == 1 if rows == 1 else self.shape[0] % rows == 0

    def line(self, rows: int) -> Line:
        """Bytes as a function of rows, which may be in another dim too: states of an LSTM have them in dim 1."""
        grows = self.carries(rows) or (rows > 1 and rows in self.shape)
        return Line(0.0, self.size_bytes / rows) if grows else Line(float(self.size_bytes), 0.0)


@dataclass(slots=True)
class _Made:
    """A tensor on its way.

    Attributes:
        source: The unit that made it; "" for own code and the batch.
        spec: What it looks like.
        straight: Whether it is still inside of the chain in which it was made.
        in_chain: Whether it was made in one.
        version: How often it had been changed in place by then.
        ref: The tensor, as long as it lives.
        given: Whether it is of the batch or of what own code made of it, also where units have handed it on.
        taken: Whether it was passed on already, so that own code is not the one that waits for it.
        taker: The unit that took it first.
    """

    source: str
    spec: TensorSpec
    straight: bool
    in_chain: bool
    version: int
    ref: weakref.ref[Tensor]
    given: bool
    taken: bool = False
    taker: str | None = None


@dataclass(slots=True)
class _Entered:
    """A tensor that a module with units was called with.

    Attributes:
        module: Its name.
        made: The tensor.
        taken_before_by: The unit that had taken it by then.
        taken_inside: Whether a unit inside of the module takes it as it is.
    """

    module: str
    made: _Made
    taken_before_by: str | None
    taken_inside: bool = False


class Tracker:
    """Told of calls by the recording's hooks, it knows in the end what flows where."""

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}
        self._outputs: list[_Made] = []
        self._passed: list[tuple[str, str, bool, str | None, TensorSpec]] = []
        self._chains: list[bool] = []  # the modules around, innermost last: is it a chain?
        self._entered: list[_Entered] = []
        self._around: list[list[_Entered]] = []  # what the modules around were called with
        self._hidden: set[str] = set()  # modules that were called with what cannot be seen
        self._given = Given()  # what the unit at work was given
        self._mixes: list[bool] = []  # the parameter-free modules at work, innermost last: do they see the batch?
        self._fed: dict[str, None] = {}
        self._out_of_sight: dict[str, None] = {}

    @property
    def sees_batch(self) -> tuple[str, ...]:
        """Units that were given the batch or what own code made of it, also through other units."""
        return tuple(self._fed)

    @property
    def out_of_sight(self) -> tuple[str, ...]:
        """Units that were called with objects that nobody can look into."""
        return tuple(self._out_of_sight)

    @property
    def _in_chain(self) -> bool:
        return bool(self._chains) and self._chains[-1]

    def enter_module(self, name: str, inputs: Iterable[Tensor] | None, *, chain: bool) -> None:
        """The forward of a module with units below it begins; of None nobody knows what it was called with."""
        self._chains.append(chain)
        entered: list[_Entered] = []
        for tensor in inputs or ():
            made = self._find(tensor) or self._add(tensor, OWN_CODE, straight=False)
            entered.append(_Entered(name, made, made.taker))
        if inputs is None:
            self._hidden.add(name)
        self._around.append(entered)
        self._entered += entered

    def leave_module(self, outputs: Iterable[Tensor]) -> None:
        """It ends; what it returns goes to the root, unless the module around it is a chain."""
        self._chains.pop()
        self._around.pop()
        for tensor in outputs:
            made = self._find(tensor)
            if made is not None:
                made.straight &= self._in_chain

    def take(self, unit: str, inputs: Iterable[Tensor], *, is_visible: bool = True) -> bool:
        """A unit is called.

        Args:
            unit: Its name.
            inputs: What it is called with, as far as it can be seen.
            is_visible: Whether that is all.

        Returns:
            Whether it may see the batch or what own code made of it.
        """
        self._given = Given(is_visible=is_visible)
        for tensor in inputs:
            made = self._find(tensor)
            if made is None:
                made = self._add(tensor, OWN_CODE, straight=False)
            made.taken = True
            if made.given:
                self._given.add(tensor)
            for entered in (each for around in self._around for each in around):
                entered.taken_inside |= entered.made is made
            chained = made.straight and self._in_chain and made.source != OWN_CODE
            self._passed.append((made.source, unit, chained, made.taker, TensorSpec.of(tensor)))
            made.taker = made.taker or unit
        self._note_given(unit, is_fed=self._given.has_tensors, is_visible=is_visible)
        return self._given.has_tensors or not is_visible

    def take_inside(self, unit: str, inputs: Iterable[Tensor], *, is_visible: bool = True) -> None:
        """A unit is called by another one, which may hand on what it was given."""
        found = [(tensor, self._find(tensor)) for tensor in inputs]
        is_fed = any(self._given.holds(tensor) if made is None else made.given for tensor, made in found)
        self._note_given(unit, is_fed=is_fed, is_visible=is_visible)

    def _note_given(self, unit: str, *, is_fed: bool, is_visible: bool) -> None:
        if is_fed:
            self._fed[unit] = None
        if not is_visible:
            self._out_of_sight[unit] = None

    def make(self, unit: str, outputs: Iterable[Tensor]) -> None:
        """A unit returns."""
        for tensor in outputs:
            given = self._given.holds(tensor)
            self._outputs.append(self._add(tensor, unit, straight=self._in_chain, given=given))
        self._given = Given()  # lets go of the tensors

    def sources(self, inputs: Iterable[Tensor], *, is_visible: bool = True) -> list[_Made]:
        """Where the inputs of a parameter-free module come from, if it stands in a chain: it computes there."""
        found = [self._find(tensor) for tensor in inputs]
        self._mixes.append(not is_visible or any(made is None or made.given for made in found))
        if not self._in_chain:
            return []
        return [made for made in found if made is not None and made.straight]

    def carry(self, sources: list[_Made], outputs: Iterable[Tensor]) -> None:
        """A parameter-free module in a chain returns: its outputs come from where its inputs were."""
        mixes = self._mixes.pop()
        if len({made.source for made in sources}) != 1:
            return
        for made in sources:
            made.taken = True
        for tensor in outputs:
            same = self._find(tensor)
            given = mixes if same is None else same.given
            self._outputs.append(self._add(tensor, sources[0].source, straight=True, given=given))

    def flows(self, rows: int) -> tuple[Flow, ...]:
        """All flows, equal ones added up, in the order in which they were seen."""
        passed = list(self._passed)
        passed += [(made.source, OWN_CODE, made.in_chain, None, made.spec) for made in self._outputs if not made.taken]
        sizes: dict[tuple[str, str, bool, str | None, bool], Line] = {}
        for source, target, chained, taker, spec in passed:
            key = (source, target, chained, taker, spec.requires_grad)
            sizes[key] = sizes.get(key, Line()) + spec.line(rows)
        return tuple(
            Flow(
                source=source,
                target=target,
                chained=chained,
                has_gradient=has_gradient,
                size_bytes=size,
                taken_before_by=taker,
            )
            for (source, target, chained, taker, has_gradient), size in sizes.items()
        )

    def entering(self, rows: int) -> tuple[Entering, ...]:
        """What modules with units were called with, in the order in which that was seen."""
        numbers: dict[int, int] = {}
        return tuple(
            Entering(
                module=entered.module,
                tensor=numbers.setdefault(id(entered.made), len(numbers)),
                source=entered.made.source,
                taken_before_by=entered.taken_before_by,
                taken_inside=entered.taken_inside,
                size_bytes=entered.made.spec.line(rows),
            )
            for entered in self._entered
            if entered.module not in self._hidden
        )

    def _find(self, tensor: Tensor) -> _Made | None:
        """Who made the tensor, if nobody changed it in place since."""
        made = self._made.get(id(tensor))
        return made if made is not None and made.ref() is tensor and made.version == version(tensor) else None

    def _add(self, tensor: Tensor, source: str, *, straight: bool, given: bool = True) -> _Made:
        made = _Made(
            source=source,
            spec=TensorSpec.of(tensor),
            straight=straight,
            in_chain=straight,
            version=version(tensor),
            ref=weakref.ref(tensor),
            given=given,
        )
        self._made[id(tensor)] = made
        return made
