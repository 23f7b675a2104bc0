"""Lets micro-batches of a training step use metrics in order."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.lanes import calling_lane
from lightning_hetero.runtime.standin import InPlace

_CALL = "_compiled_call_impl"  # where torch looks before it calls a module
_IN_ORDER = "update"
_ALONE = ("compute", "reset")  # what they mean depends on all updates before
_SHARES = "_compute_groups_create_state_ref"  # by it a collection of metrics hands states from one to the others

Seen = Callable[[nn.Module, Sequence[Any], Mapping[str, Any], Any], None]


class Gate(InPlace):
    """Lets micro-batches use a module in order: a metric, whose state every call changes.

    Args:
        module: The module; its calls, and those of its method `update` if it has one, pass the gate. Its methods
            `compute` and `reset` are noted, and no lane gets through.
        seen: Told of each call of the module, in order: the module, the arguments by position and by name, the output.
        beside: The gate of a module that has its turn together with this one.

    Attributes:
        key: What micro-batches pass when they get through.
        used: What user code has called since this was emptied: "forward", "update", "compute", "reset".
        calls: How often it has, since this was set to 0.
        in_unit: Says whether a unit runs, while somebody looks at what the step does.
        used_in_unit: Whether code of a unit has called it meanwhile.
    """

    def __init__(self, module: nn.Module, seen: Seen | None = None, beside: Gate | None = None) -> None:
        self._module = module
        self._seen = seen
        self._doors = [_Door(self, module, name) for name in (_IN_ORDER, *_ALONE, _SHARES) if hasattr(module, name)]
        self._inside: set[int] = set() if beside is None else beside._inside
        self.key: int = id(module) if beside is None else beside.key
        self.used: set[str] = set()
        self.calls = 0
        self.in_unit: Callable[[], bool] = never
        self.used_in_unit = False

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is the gate of this module."""
        return self._module is module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, when it is this micro-batch's turn."""
        with self.turn("forward"):
            output = self._module._call_impl(*args, **kwargs)
            if self._seen is not None:
                self._seen(self._module, args, kwargs, output)
            return output

    def install(self) -> None:
        """Take the place of the module's calls."""
        self._module.__dict__[_CALL] = self
        for door in self._doors:
            door.install()

    def remove(self) -> None:
        """Give it back."""
        if self._module.__dict__.get(_CALL) is self:
            del self._module.__dict__[_CALL]
        for door in self._doors:
            door.remove()

    @property
    def needs_all_before(self) -> str | None:
        """Why micro-batches that use the module as they have done cannot be under way at once; None if they can."""
        name = type(self._module).__name__
        alone = next((each for each in _ALONE if each in self.used), None)
        if alone is not None:
            return f"it calls {alone} of {name}, which depends on the micro-batches before"
        if self.used_in_unit:
            return f"a part calls {name}, so nobody knows for which micro-batch"
        if len(self.used) > 1:
            return f"it calls {name} and its update, which has one order only if they are alone"
        return None

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Within the block it is this micro-batch's turn; what a metric calls of itself needs no other one.

        Raises:
            CannotCutError: Lanes cannot do that.
        """
        me, lane = threading.get_ident(), calling_lane()
        if me in self._inside or (name == _SHARES and not self._shares_states):
            yield
            return
        if name != _SHARES:
            self.used.add(name)
        self.calls += 1
        self.used_in_unit |= self.in_unit()
        if lane is not None and name in _ALONE:
            raise CannotCutError(f"it calls {name} of {type(self._module).__name__}")
        self._inside.add(me)
        try:
            if lane is None:
                yield
            else:
                with lane.call.passing(lane, self.key, type(self._module).__name__):
                    yield
        finally:
            self._inside.discard(me)

    @property
    def _shares_states(self) -> bool:
        """Whether the module is a collection in which some metrics have the state of another one."""
        return any(len(group) > 1 for group in getattr(self._module, "compute_groups", {}).values())

    def __reduce__(self) -> Any:
        return _nothing, ()


class _Door(InPlace):
    """Stands in for a method of the module. Copies and pickles of the module have their own method there."""

    def __init__(self, gate: Gate, module: nn.Module, name: str) -> None:
        self._gate = gate
        self._module = module
        self._name = name
        self._before: Callable[..., Any] | None = module.__dict__.get(name)
        self._method: Callable[..., Any] = getattr(module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._gate.turn(self._name):
            return self._method(*args, **kwargs)

    def install(self) -> None:
        self._module.__dict__[self._name] = self

    def remove(self) -> None:
        if self._module.__dict__.get(self._name) is not self:
            return
        if self._before is None:
            del self._module.__dict__[self._name]
        else:
            self._module.__dict__[self._name] = self._before

    def __reduce__(self) -> Any:
        return (_own_method, (self._module, self._name)) if self._before is None else (_itself, (self._before,))


def never() -> bool:
    """What a gate asks while nobody looks."""
    return False


def _nothing() -> None:
    return None


def _own_method(module: nn.Module, name: str) -> Any:
    return types.MethodType(getattr(type(module), name), module)


def _itself(method: Any) -> Any:
    return method
