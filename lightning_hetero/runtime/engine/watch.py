"""Who does what during a trial: units and the code between them draw random numbers, change inputs, get hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from lightning_hetero.runtime.containers import are_unchanged, contents
from lightning_hetero.runtime.engine.in_turn import InTurn
from lightning_hetero.runtime.engine.state import saves_otherwise
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import version_of

# Hooks that run when the module is called, or that see its gradients.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _HasDevice(Protocol):
    @property
    def torch_device(self) -> torch.device: ...


class Watched(Protocol):
    """A unit, as far as a trial goes."""

    name: str
    number: int
    draws: bool
    keeps_state: bool
    runs_again: bool

    @property
    def stateful(self) -> Sequence[nn.Module]:
        """The modules in it whose buffers its forward may change."""

    @property
    def worker(self) -> _HasDevice:
        """The thread of its device."""

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The modules that it runs."""


class Listener(Protocol):
    """Whom units tell that they are called."""

    def unit(self, unit: Any, inputs: Any) -> AbstractContextManager[None]:
        """What a call of a unit runs in."""


class Watch:
    """Sees, during a trial, who draws random numbers (units, or the code between them), and who changes its inputs.

    Args:
        generators: The default generators of all devices of the plan, that of the root first.
        numbers: What sets them for each piece of a step; None leaves them alone.

    Attributes:
        units: The units that drew.
        own_code: Whether the region's own code did.
        changer: Name of a unit that changed its input in place; None if none did.
        writer: Name of a unit that wrote into a list, mapping or dataclass among its inputs; None if none did.
        trouble: What else was seen that lanes could not do, in words that follow "because"; None if nothing was.
        stray_draws: Who draws random numbers that cannot be set for each micro-batch, in such words; None if nobody.
        at_border: Called where a unit begins and where it ends.
        current: The unit that runs.
        in_order: Numbers of units that keep state, one for each call.
        stateful: `id` of the modules in them that do, by number.
        runs_again: Name of one that was called under activation checkpointing from outside; None if none was.
        called_in_backward: Name of one that code of a backward called, but for what checkpointing runs again; likewise.
        drew_in_backward: Whether code of a backward drew random numbers.
        draws_again: Name of one that draws and was called under activation checkpointing from outside, in comparisons.
        other_backwards: Says how many other backwards there are.
        callers: Units that have called others.
        called_in_function: Name of one that a function of autograd calls in its forward, which may keep the graph.
    """

    def __init__(self, generators: Generators, numbers: InTurn | None = None) -> None:
        self._generators = generators
        self._numbers = numbers
        self._root = next(iter(generators.of))
        self._states = generators.states()
        self._depth = 0
        self._over = False
        self.current: Watched | None = None
        self.units: list[Watched] = []
        self.own_code = False
        self.changer: str | None = None
        self.writer: str | None = None
        self.trouble: str | None = None
        self.stray_draws: str | None = None
        self.at_border: Callable[[], None] = lambda: None
        self.in_order: list[int] = []
        self.stateful: dict[int, set[int]] = {}
        self._in_backward = False
        self._is_backward = False
        self.runs_again: str | None = None
        self.called_in_backward: str | None = None
        self.drew_in_backward = False
        self.draws_again: str | None = None
        self.other_backwards: Callable[[], int] = int
        self.callers: list[Watched] = []
        self.called_in_function: str | None = None

    def note_saving(self) -> None:
        """Within an operation: see whether the unit that runs makes part of its forward run again in the backward."""
        if self.current is not None and not self.current.runs_again and saves_otherwise():
            self.current.runs_again = True

    @property
    def in_unit(self) -> bool:
        """Whether the code that runs now is that of a unit."""
        return self._depth > 0

    @contextmanager
    def unit(self, unit: Watched, inputs: Any) -> Iterator[None]:
        """What is drawn within the block is drawn by `unit`, or by the unit around it."""
        if self._is_backward and not saves_otherwise():
            self.called_in_backward = unit.name
        if self._over and not self._depth and saves_otherwise() and unit in self.units:
            self.draws_again = unit.name
        if self._depth and self.current is not None and self.current is not unit:
            self.callers.append(self.current)
        if self._over or self._depth:
            around, self.current = self.current, self.current or unit
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self.current = around
            return
        self._look_at_own_code()
        if self.called_in_function is None and _is_in_function_of_autograd():
            self.called_in_function = unit.name
        self.at_border()
        before = [] if unit.keeps_state else _buffers_of(unit)
        if any(has_hooks(module) for part in unit.parts for module in part.modules()):
            self.trouble = f"{unit.name} gets hooks of user code while it runs"
        self._depth += 1
        self.current = unit
        tensors = Tree(inputs).tensors
        versions = [version_of(tensor) for tensor in tensors]
        containers = contents(inputs)
        try:
            with self._set_numbers(None if self._numbers is None else self._numbers.unit(unit, inputs)):
                try:
                    yield
                finally:
                    self._look_at(unit)
        finally:
            self._depth -= 1
            self.current = None
            if not unit.keeps_state and before != _buffers_of(unit) and not unit.stateful:
                unit.keeps_state = True  # in evaluation, too
            self._note_order(unit)
            if versions != [version_of(tensor) for tensor in tensors]:
                self.changer = unit.name
            if not are_unchanged(containers):
                self.writer = unit.name
            self.at_border()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within the block, code runs only because autograd calls it."""
        self._is_backward = True
        before = self._generators.states()
        try:
            yield
            self.drew_in_backward = self.drew_in_backward or bool(self._generators.drawn_since(before))
        finally:
            self._is_backward = False

    def _note_order(self, unit: Watched) -> None:
        stateful = unit.stateful
        if stateful:
            self.in_order.append(unit.number)
            self.stateful.setdefault(unit.number, set()).update(map(id, stateful))
            if saves_otherwise():
                self.runs_again = unit.name

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Code of a step runs for the micro-batch with that index, and then its backward."""
        self._look_at_backward()
        self._in_backward = True
        with self._set_numbers(None if self._numbers is None else self._numbers.micro_batch(index)):
            try:
                yield
            finally:
                self._look_at_own_code()

    @contextmanager
    def _set_numbers(self, numbers: AbstractContextManager[None] | None) -> Iterator[None]:
        """Within the block generators are set, which is no drawing."""
        if numbers is None:
            yield
            return
        try:
            with numbers:
                self._states = self._generators.states()
                yield
        finally:
            self._states = self._generators.states()

    def end(self) -> None:
        """Watch no more: what follows is done for comparison only."""
        self._look_at_backward()
        self._look_at_own_code()
        self._over = True

    @property
    def any(self) -> bool:
        """Whether anybody draws."""
        return self.own_code or bool(self.units)

    def _look_at_backward(self) -> None:
        if self._in_backward and self._drawn():
            self.own_code = True
            self.stray_draws = self.stray_draws or "its backward draws random numbers"

    def _look_at_own_code(self) -> None:
        drawn = self._drawn()
        self.own_code = self.own_code or bool(drawn)
        if drawn - {self._root}:
            self.stray_draws = (
                f"its code draws random numbers on {min(map(str, drawn - {self._root}))}, off its own device"
            )

    def _look_at(self, unit: Watched) -> None:
        drawn = self._drawn()
        if drawn:
            self.units.append(unit)
        device = unit.worker.torch_device
        if drawn - {device}:
            self.stray_draws = (
                f"{unit.name} draws random numbers on {min(map(str, drawn - {device}))}, but is on {device}"
            )
        elif drawn and self._numbers is not None and saves_otherwise():
            self.stray_draws = f"{unit.name} draws random numbers under activation checkpointing from outside"

    def _drawn(self) -> set[torch.device]:
        """The devices whose generators were used since this was asked last."""
        drawn = self._generators.drawn_since(self._states)
        if drawn:
            self._states = self._generators.states()
        return drawn


def _is_in_function_of_autograd() -> bool:
    """Whether some code that is under way is the forward of an `autograd.Function`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "forward"
            and code.co_argcount
            and isinstance(frame.f_locals.get(code.co_varnames[0]), torch.autograd.function.FunctionCtx)
        ):
            return True
        frame = frame.f_back
    return False


def _buffers_of(unit: Watched) -> list[tuple[int, int]]:
    with torch._C.DisableTorchFunction():  # whoever watches operations would see that the version is read
        return [(id(buffer), version_of(buffer)) for part in unit.parts for buffer in part.buffers()]


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of user code."""
    return any(not isinstance(hook, Hook) for kind in HOOKS for hook in getattr(module, kind).values())
