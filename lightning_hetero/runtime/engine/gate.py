"""Lets micro-batches of a training step use metrics in order."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.lanes import calling_lane
from lightning_hetero.runtime.standin import InPlace, hide_from_copies, show_again
from lightning_hetero.runtime.transfer import version_of

_CALL = "_compiled_call_impl"  # where torch looks before it calls a module
_IN_ORDER = "update"
_ALONE = ("compute", "reset")  # what they mean depends on all updates before
_SHARES = "_compute_groups_create_state_ref"  # by it a collection of metrics hands states from one to the others
_COUNTS = ("_update_count", "metric_state", "update_called", "update_count")  # read as states are
_NO_STATE = frozenset({"_state_is_copy"})  # a mark of collections, who has which state is looked at itself

Seen = Callable[[nn.Module, Sequence[Any], Mapping[str, Any], Any], None]


class Together:
    """Metrics that have their turn together: one, or a collection or wrapper and all that are in it.

    Attributes:
        key: What micro-batches pass when they get through.
        gates: One for each.
        tensors: Those that were the state at some moment, while somebody looks.
        change: What was changed in another way than by their calls meanwhile, in words that follow "because"; or None.
        is_read: Whether other code has read one of these tensors.
    """

    def __init__(self, key: int) -> None:
        self.key = key
        self.gates: list[Gate] = []
        self.tensors: dict[int, Tensor] = {}
        self.change: str | None = None
        self.is_read = False
        self._inside: set[int] = set()
        self._state: list[Any] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the calling thread is inside."""
        return threading.get_ident() in self._inside

    def look(self) -> None:
        """See whether the states are as they were left; from the first time on."""
        now = self._now()
        if self._state is not None and self._state != now and self.change is None:
            self.change = f"the state of {self.gates[0].name} is set, and not by its update"
        self._keep(now)

    def end(self) -> None:
        """Look no more."""
        self._state, self.change, self.tensors, self.is_read = None, None, {}, False

    def _now(self) -> list[Any]:
        with torch._C.DisableTorchFunction():  # or whoever watches operations sees that versions are read
            return [each for gate in self.gates for each in gate.state()]

    def _keep(self, state: list[Any]) -> None:
        self._state = state
        self.tensors.update((id(each), each) for gate in self.gates for each in gate.tensors())

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within the block, what the calling thread calls of them needs no turn."""
        me = threading.get_ident()
        if self._state is not None:
            self.look()
        self._inside.add(me)
        try:
            yield
        finally:
            self._inside.discard(me)
            if self._state is not None:
                self._keep(self._now())


class Gate(InPlace):
    """Lets micro-batches use a module in order: a metric, whose state every call changes.

    Args:
        module: The module; its calls, and those of its method `update` if it has one, pass the gate. Its methods
            `compute` and `reset` are noted, and no lane gets through.
        together: Those that have their turn with it.
        seen: Told of each call of the module, in order: the module, the arguments by position and by name, the output.

    Attributes:
        used: What user code has called since this was emptied: "forward", "update", "compute", "reset".
        calls: How often it has, since this was set to 0.
        in_unit: Says whether a unit runs, while somebody looks at what the step does.
        used_in_unit: Whether code of a unit has called it meanwhile.
    """

    stays_behind = True

    def __init__(self, module: nn.Module, together: Together, seen: Seen | None = None) -> None:
        self.module = module
        self.together = together
        self._seen = seen
        self._doors = [_Door(self, module, name) for name in (_IN_ORDER, *_ALONE, _SHARES) if hasattr(module, name)]
        self.used: set[str] = set()
        self.calls = 0
        self.in_unit: Callable[[], bool] = never
        self.used_in_unit = False
        together.gates.append(self)

    @property
    def name(self) -> str:
        """What the module is called in messages."""
        return type(self.module).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call, when it is this micro-batch's turn."""
        with self.turn("forward"):
            output = self.module._call_impl(*args, **kwargs)
            if self._seen is not None:
                self._seen(self.module, args, kwargs, output)
            return output

    def install(self) -> None:
        """Take the place of the module's calls."""
        self.module.__dict__[_CALL] = self
        for door in self._doors:
            door.install()
        hide_from_copies(self.module)

    def remove(self) -> None:
        """Give it back."""
        if self.module.__dict__.get(_CALL) is self:
            del self.module.__dict__[_CALL]
        for door in self._doors:
            door.remove()
        show_again(self.module)

    @property
    def needs_all_before(self) -> str | None:
        """Why micro-batches that use the module as they have done cannot be under way at once; None if they can."""
        alone = next((each for each in _ALONE if each in self.used), None)
        if alone is not None:
            return f"it calls {alone} of {self.name}, which depends on the micro-batches before"
        if self.used_in_unit:
            return f"a part calls {self.name}, so nobody knows for which micro-batch"
        if len(self.used) > 1:
            return f"it calls {self.name} and its update, which has one order only if they are alone"
        return None

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Within the block it is this micro-batch's turn; what a metric calls of itself needs no other one.

        Raises:
            CannotCutError: Lanes cannot do that.
        """
        lane = calling_lane()
        if self.together.is_open or (name == _SHARES and not self._shares_states):
            yield
            return
        if name != _SHARES:
            self.used.add(name)
        self.calls += 1
        self.used_in_unit |= self.in_unit()
        if lane is not None and name in _ALONE:
            raise CannotCutError(f"it calls {name} of {self.name}")
        if lane is None:
            with self.together.inside():
                yield
        else:
            with lane.call.passing(lane, self.together.key, self.name), self.together.inside():
                yield

    def state(self) -> Iterator[Hashable]:
        """What tells whether the module has been changed."""
        for name, value in self.module.__dict__.items():
            if name in _NO_STATE or isinstance(value, InPlace):
                continue
            yield name
            if isinstance(value, (list, tuple, dict)):
                yield type(value), len(value)
                for item in value.values() if isinstance(value, dict) else value:
                    yield _mark(item)
            else:
                yield _mark(value)

    def watch_readers(self) -> None:
        """Note whether other code reads its state from now on: its class is replaced by a subclass."""
        base: Any = type(self.module)
        together, names = self.together, frozenset((*self.module.__dict__.get("_defaults", ()), *_COUNTS))

        def __getattribute__(metric: Any, name: str) -> Any:  # noqa: N807
            if name in names and not together.is_open:
                together.is_read = True
            return base.__getattribute__(metric, name)

        def __reduce_ex__(metric: Any, protocol: Any) -> Any:  # noqa: N807
            together.is_read = together.is_read or not together.is_open
            make, args, *rest = base.__reduce_ex__(metric, protocol)
            return make, tuple(base if arg is type(metric) else arg for arg in args), *rest  # a copy notes nothing

        namespace = {
            "__getattribute__": __getattribute__,
            "__reduce_ex__": __reduce_ex__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        object.__setattr__(self.module, "__class__", type(base.__name__, (base,), namespace))

    def tensors(self) -> Iterator[Tensor]:
        """Those that are its state."""
        for name in self.module.__dict__.get("_defaults", ()):
            value = self.module.__dict__.get(name)
            for each in value if isinstance(value, list) else (value,):
                if isinstance(each, Tensor):
                    yield each

    @property
    def _shares_states(self) -> bool:
        """Whether the module is a collection in which some metrics have the state of another one."""
        return any(len(group) > 1 for group in getattr(self.module, "compute_groups", {}).values())

    def __reduce__(self) -> Any:
        return _nothing, ()


class _Door(InPlace):
    """Stands in for a method of the module. Copies and pickles of the module have their own method there."""

    stays_behind = True

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


def _mark(value: Any) -> Hashable:
    """What is another one for another value, or a changed one."""
    if isinstance(value, Tensor):
        return id(value), version_of(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _nothing() -> None:
    return None


def _own_method(module: nn.Module, name: str) -> Any:
    return types.MethodType(getattr(type(module), name), module)


def _itself(method: Any) -> Any:
    return method
