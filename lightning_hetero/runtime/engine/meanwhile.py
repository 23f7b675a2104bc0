"""What a training step changes for a while: lanes that are under way would see the changes of each other."""

from __future__ import annotations

from collections.abc import Container, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import CONTAINERS, LARGE, content, is_same
from lightning_hetero.runtime.transfer import version_of

_MISSING = object()
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))


class Meanwhile:
    """Compares modes, attributes and requires_grad at several moments of a step with those when its first unit begins.

    What a step sets before that, and leaves as it is, is thus no difference: every micro-batch sets the same. This is
    asked again and again, so it has to be quick. Buffers of units, which lanes change in order while units run, must
    not change between them.

    Args:
        modules: Names and modules; the first is the root. Its own attributes are not looked at: twins have them.
        ignored: `id` of modules that are not looked at.

    Attributes:
        change: What was different at some moment, in words that follow "because"; None if nothing was.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], ignored: Container[int]) -> None:
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
        self._trained: list[bool] = []
        self.change: str | None = None

    def at_border(self) -> None:
        """A unit begins or ends."""
        if self._before is None:
            self._before, self._trained = [dict(attributes) for _, attributes in self._below], self._trained_now()
        self.look()
        self._in_unit = not self._in_unit
        if self._in_unit:
            self._look_at_buffers()
        else:
            self._left = self._buffers_now()

    def end(self) -> None:
        """The step is over."""
        self._look_at_buffers()

    def _buffers_now(self) -> list[tuple[int, int]]:
        return [(id(b), version_of(b)) for _, buffers in self._buffers for b in buffers.values() if b is not None]

    def _look_at_buffers(self) -> None:
        if self._left is None or self.change is not None or (now := self._buffers_now()) == self._left:
            return
        names = [f"{name}.{key}" for name, buffers in self._buffers for key, b in buffers.items() if b is not None]
        changed = [name for name, a, b in zip(names, now, self._left, strict=False) if a != b]
        self.change = (
            f"the buffer {changed[0] if changed else 'of a part'} is changed, and not by the forward of its module"
        )

    def _trained_now(self) -> list[bool]:
        with torch._C.DisableTorchFunction():  # or whoever watches operations sees each parameter that is asked
            return [parameter.requires_grad for _, parameter in self._parameters.values()]

    def look(self) -> None:
        """Compare now, if some unit has begun."""
        if self._before is None or self.change is not None:
            return
        trained = self._trained_now()
        for (name, now), before in zip(self._below, self._before, strict=True):
            if len(now) != len(before) or not all(map(is_, now.values(), before.values())):
                self.change = _difference(name, now, before)
                if self.change is not None:
                    return
        if trained != self._trained:
            differs = (now != then for now, then in zip(trained, self._trained, strict=True))
            name = next(path for (path, _), differ in zip(self._parameters.values(), differs, strict=True) if differ)
            self.change = f"requires_grad of {name} is switched within it"
            return
        for path, value, kept in self._containers:
            if not is_same(value, kept, quickly=True):
                self.change = f"the content of {path} is changed for a while"
                return


def _difference(name: str, now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """In words; None if the same attributes stand in another order."""
    changed = (key for key in {**before, **now} if now.get(key, _MISSING) is not before.get(key, _MISSING))
    key = next(changed, None)
    if key == "training":
        return f"the mode (training or not) of {name} is switched within it"
    return None if key is None else f"{name}.{key} is set"


def writes_of(parameter: Tensor) -> tuple[int, int]:
    """What is another one after a write to a parameter, and after a new value of `parameter.data`."""
    try:
        return version_of(parameter), parameter.data_ptr() if parameter.layout is torch.strided else 0
    except (NotImplementedError, RuntimeError, ValueError):  # it has no memory of its own, or none yet
        return 0, 0
