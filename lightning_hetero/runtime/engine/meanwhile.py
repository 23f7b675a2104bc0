"""What a training step changes for a while: lanes that are under way would see the changes of each other."""

from __future__ import annotations

from collections.abc import Container, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import CONTAINERS, LARGE, Thing, content, is_same
from lightning_hetero.runtime.engine.names import Name
from lightning_hetero.runtime.engine.quick_look import QuickLook
from lightning_hetero.runtime.engine.state import ProcessModes
from lightning_hetero.runtime.engine.watch import HOOKS
from lightning_hetero.runtime.transfer import version_of

_MISSING = object()
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
# What code can exchange for a call: parameters (`functional_call`), submodules, hooks. Buffers are those of units.
_REGISTERED = ("_parameters", "_modules", *HOOKS)
_PLAIN = (Tensor, nn.Parameter)
_MOST = 500  # things looked at after every operation


class Meanwhile:
    """Compares what modules and their code have at several moments of a step with that when its first unit begins.

    That is modes, attributes, what is inside of them, parameters, submodules, hooks, requires_grad, and what code of
    the modules names: globals, attributes of classes, variables of functions around it. What a step sets before that,
    and leaves as it is, is thus no difference: every micro-batch sets the same. This is asked again and again, so it
    has to be quick. Buffers of units, which lanes change in order while units run, must not change between them.

    Args:
        modules: Names and modules; the first is the root. Its own attributes are not looked at: twins have them.
        ignored: `id` of modules that are not looked at.
        inside: What can change inside of attributes and names.
        names: Names outside of modules.
        beside: Whether somebody else looks at attributes and what is inside of them (`Snapshot.look`).

    Attributes:
        change: What was different at some moment, in words that follow "because"; None if nothing was.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        ignored: Container[int],
        inside: Sequence[Thing] = (),
        names: Sequence[Name] = (),
        *,
        beside: bool = False,
    ) -> None:
        self._is_beside = beside
        self._inside, self._names = inside[:_MOST], names[:_MOST]
        self._registered = [
            (f"{name}.{key}".lstrip("."), registry)
            for name, module in modules
            if id(module) not in ignored and not isinstance(module, torch.jit.ScriptModule)  # its own are in C++
            for key in _REGISTERED
            if isinstance(registry := module.__dict__.get(key), dict)
        ]
        self._below = [(name, module.__dict__) for name, module in modules[1:] if id(module) not in ignored]
        self._parameters = {
            id(parameter): (f"{name}.{key}" if name else key, parameter)
            for name, module in modules
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        root = ("self", modules[0][1].__dict__)
        self._containers = [
            (f"{name}.{key}", value, content(value, may_be_large=True))
            for name, attributes in (root, *self._below)
            for key, value in attributes.items()
            if key not in _EVERY_MODULE_HAS and isinstance(value, CONTAINERS) and len(value) <= LARGE
        ]
        self._buffers = [(name, module._buffers) for name, module in modules[1:] if id(module) not in ignored]
        self._in_unit = False
        self._left: list[tuple[int, int]] | None = None  # the buffers when the last unit ended
        self._before: list[dict[str, Any]] | None = None
        self._trained: list[tuple[bool, int]] = []
        self._quick = QuickLook((), (), ())
        self._quick_outside = QuickLook((), (), ())
        self._first: list[Thing] = []  # what was inside
        self._outside: list[Thing] = []  # of modules, among these
        self._bound: list[Any] = []  # to names
        # Most registries are empty, and there are a dozen for each module: these are looked at all at once.
        self._empty: list[dict[str, Any]] = []
        self._filled: list[tuple[dict[str, Any], Sequence[Any]]] = []
        self._plain: list[Tensor] = []  # parameters that have a place
        self._places: list[int] = []
        self._flags: list[bool] = []
        self._modes = ProcessModes.now()
        self.change: str | None = None

    def at_border(self) -> None:
        """A unit begins or ends."""
        if self._before is None:
            self.begin()
        self.look()
        self._in_unit = not self._in_unit
        if self._in_unit:
            self._look_at_buffers()
        else:
            self._left = self._buffers_now()

    def begin(self) -> None:
        """Compare with what is there now, from now on."""
        self._before, self._trained = [dict(attributes) for _, attributes in self._below], self._trained_now()
        self._empty = [registry for _, registry in self._registered if not registry]
        self._filled = [(registry, [*registry.values()]) for _, registry in self._registered if registry]
        parameters = [each for _, each in self._parameters.values()]
        with torch._C.DisableTorchFunction():
            self._plain = [each for each in parameters if _place_of(each)]
            self._places = [each.data_ptr() for each in self._plain]
            self._flags = [each.requires_grad for each in parameters]
        self._bound = [name.value for name in self._names]
        with torch._C.DisableTorchFunction():
            for thing in self._inside:
                is_tensor = isinstance(thing.value, Tensor)
                kept = (version_of(thing.value), None) if is_tensor else content(thing.value, may_be_large=False)
                if kept is not None:
                    self._first.append(thing._replace(content=kept))
            outside = {name.where for name in self._names}
            self._outside = [thing for thing in self._first if thing.module in outside]
            self._quick, self._quick_outside = QuickLook((), self._first, ()), QuickLook((), self._outside, ())

    def look_at_what_all_have(self) -> None:
        """Compare modes of the process, and names and contents outside of modules: they matter inside of units, too."""
        if self.change is not None:
            return
        if (change := self._modes.change()) is not None:
            self.change = f"it {change} for a while"
        if self._before is None or self.change is not None:
            return
        for bound, value in zip(self._names, self._bound, strict=True):
            if bound.value is not value:
                self.change = f"{bound.where} is set"
                return
        if self._outside:
            with torch._C.DisableTorchFunction():
                if not self._quick_outside.is_as_before() and (thing := _changed(self._outside)) is not None:
                    self.change = f"the content of {thing.module} is changed for a while"

    def end(self) -> None:
        """The step is over."""
        self._look_at_buffers()

    def _buffers_now(self) -> list[tuple[int, int]]:
        with torch._C.DisableTorchFunction():
            return [(id(b), version_of(b)) for _, buffers in self._buffers for b in buffers.values() if b is not None]

    def _look_at_buffers(self) -> None:
        if self._left is None or self.change is not None or (now := self._buffers_now()) == self._left:
            return
        names = [f"{name}.{key}" for name, buffers in self._buffers for key, b in buffers.items() if b is not None]
        changed = [name for name, a, b in zip(names, now, self._left, strict=False) if a != b]
        self.change = (
            f"the buffer {changed[0] if changed else 'of a part'} is changed, and not by the forward of its module"
        )

    def _trained_now(self) -> list[tuple[bool, int]]:
        with torch._C.DisableTorchFunction():  # or whoever watches operations sees each parameter that is asked
            return [(each.requires_grad, _place_of(each)) for _, each in self._parameters.values()]

    def look(self) -> None:
        """Compare now, if some unit has begun."""
        self.look_at_what_all_have()
        if self._before is not None and self.change is None:
            self.change = self._of_modules(self._before) or self._inside_of_modules()

    def _of_modules(self, before: Sequence[dict[str, Any]]) -> str | None:
        """What is different in attributes, parameters and registries; None if nothing is."""
        for (name, now), attributes in () if self._is_beside else zip(self._below, before, strict=True):
            if len(now) != len(attributes) or not all(map(is_, now.values(), attributes.values())):
                difference = _difference(name, now, attributes)
                if difference is not None:
                    return difference
        if self._are_parameters_changed():
            trained = self._trained_now()
            pairs = zip(self._parameters.values(), trained, self._trained, strict=True)
            path, new, old = next((path, new, old) for (path, _), new, old in pairs if new != old)
            if new[0] != old[0]:
                return f"requires_grad of {path} is switched within it"
            return f"the data of {path} are exchanged for a while"
        changed = next(filter(None, self._empty), None) if any(self._empty) else None
        for registry, members in self._filled:
            if len(registry) != len(members) or not all(map(is_, registry.values(), members)):
                changed = registry
                break
        if changed is None:
            return None
        name = next(name for name, registry in self._registered if registry is changed)
        return f"{name} is changed for a while"

    def _are_parameters_changed(self) -> bool:
        with torch._C.DisableTorchFunction():  # or whoever watches operations sees each parameter that is asked
            if [each.requires_grad for _, each in self._parameters.values()] != self._flags:
                return True
            try:
                return [each.data_ptr() for each in self._plain] != self._places
            except (NotImplementedError, RuntimeError):  # it has been given data of another kind
                return True

    def _inside_of_modules(self) -> str | None:
        """What is different inside of attributes."""
        if self._is_beside:
            return None
        with torch._C.DisableTorchFunction():
            if not self._quick.is_as_before() and (thing := _changed(self._first)) is not None:
                return f"the content of {thing.module}.{thing.key} is changed for a while"
        for path, value, kept in self._containers:
            if not is_same(value, kept, quickly=True):
                return f"the content of {path} is changed for a while"
        return None


def _changed(things: Sequence[Thing]) -> Thing | None:
    return next((each for each in things if not is_same(each.value, each.content, quickly=True)), None)


def _difference(name: str, now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """In words; None if the same attributes stand in another order."""
    changed = (key for key in {**before, **now} if now.get(key, _MISSING) is not before.get(key, _MISSING))
    key = next(changed, None)
    if key == "training":
        return f"the mode (training or not) of {name} is switched within it"
    return None if key is None else f"{name}.{key} is set"


def _place_of(parameter: Tensor) -> int:
    """Where its numbers are; 0 if that cannot be told."""
    try:
        return parameter.data_ptr() if type(parameter) in _PLAIN and parameter.layout is torch.strided else 0
    except (NotImplementedError, RuntimeError):  # some devices have no places
        return 0


def writes_of(parameter: Tensor) -> tuple[int, int]:
    """What is another one after a write to a parameter, and after a new value of `parameter.data`."""
    try:
        return version_of(parameter), parameter.data_ptr() if parameter.layout is torch.strided else 0
    except (NotImplementedError, RuntimeError, ValueError):  # it has no memory of its own, or none yet
        return 0, 0
