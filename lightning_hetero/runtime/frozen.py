"""Functions among the arguments of a call, for a second run of it: with the variables around them as they are now.

`for i, layer in enumerate(layers): x = layer(x, lambda z: z * i)`: when the backward runs a layer again, `i` is the
last one in all of these functions. And what a function counts in a variable around it (`nonlocal`) is counted once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import CellType, FunctionType
from typing import Any

_CONTAINERS = (list, dict, set)


class Frozen:
    """Copies of functions, and of `functools.partial`, made now.

    Args:
        values: The arguments, or what is in them, in any structure of lists, tuples and dictionaries.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # or somebody else may get their `id`
        todo = [values]
        while todo:
            value = todo.pop()
            if isinstance(value, dict):
                todo += value.values()
            elif isinstance(value, (list, tuple)):
                todo += value
            elif isinstance(value, (FunctionType, functools.partial)):
                self._copy(value)

    def of(self, value: Any) -> Any:
        """The same structure, with the copies in the place of the originals."""
        if not self._copies:
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        if type(value) is dict:
            return {key: self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        return value

    def _copy(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, functools.partial):
            return self._keep(value, lambda: self._partial(value))
        if isinstance(value, FunctionType) and value.__closure__:
            return self._function(value, value.__closure__)
        return value

    def _keep(self, value: Any, make: Any) -> Any:
        made = self._copies[id(value)] = make()
        self._originals.append(value)
        return made

    def _partial(self, value: functools.partial[Any]) -> Any:
        args = map(self._argument, value.args)
        return functools.partial(
            self._copy(value.func), *args, **{name: self._argument(each) for name, each in value.keywords.items()}
        )

    def _argument(self, value: Any) -> Any:
        return copy.copy(value) if type(value) in _CONTAINERS else self._copy(value)

    def _function(self, value: FunctionType, closure: Sequence[CellType]) -> FunctionType:
        cells = tuple(CellType() for _ in closure)
        made: FunctionType = self._keep(
            value, lambda: FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        )
        made.__kwdefaults__ = value.__kwdefaults__
        made.__qualname__ = value.__qualname__
        made.__dict__.update(value.__dict__)
        for cell, new in zip(closure, cells, strict=True):
            with suppress(ValueError):  # a variable that has no value yet
                new.cell_contents = self._copy(cell.cell_contents)  # which may be the function itself
        return made
