"""Names outside of modules that their code can bind anew: attributes of classes, and globals."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.runtime.engine.contents import CONTAINERS, Thing, is_users, things

_BOUND_ANEW = (
    *CONTAINERS, Tensor, bool, int, float, str, type(None), random.Random, torch.Generator, threading.local,
)  # fmt: skip


_WRAPPERS = (
    (FunctionType, "__wrapped__"),
    ((staticmethod, classmethod, MethodType), "__func__"),
    (property, "fget"),
    (functools.cached_property, "func"),
    (type(functools.cache(len)), "__wrapped__"),
)


class Name:
    """A name that code of user classes can bind anew: an attribute of a class, a global of its module.

    Args:
        owner: The class, the dictionary of globals, or the cell of a variable of a function around.
        name: The name.
        where: What to call it.
    """

    def __init__(self, owner: Any, name: str, where: str) -> None:
        self.where = where
        self._owner = owner
        self._name = name
        self._value = self._get()

    @property
    def is_of_thread(self) -> bool:
        """Whether each thread has a value of its own, so that lanes lack that of the caller."""
        return isinstance(self._value, threading.local)

    @property
    def things(self) -> Iterator[Thing]:
        """What can change inside."""
        found = things(self.where, self._name, self._value, set(), may_be_large=False)
        return (thing for thing in found if isinstance(thing, Thing))

    def put_back(self) -> bool:
        """Undo a change. Returns whether there was one."""
        if self._get() is self._value:
            return False
        if isinstance(self._owner, dict):
            self._owner[self._name] = self._value
        elif isinstance(self._owner, CellType):
            self._owner.cell_contents = self._value
        else:
            setattr(self._owner, self._name, self._value)
        return True

    def _get(self) -> Any:
        if isinstance(self._owner, CellType):
            return self._owner.cell_contents
        return self._owner.get(self._name) if isinstance(self._owner, dict) else vars(self._owner).get(self._name)


def names_of(classes: Iterable[type], functions: Iterable[Any] = ()) -> Iterator[Name]:
    """What code of user classes may change beside their objects.

    That is attributes of the classes, and what their methods name: globals, and variables of functions around them.
    Functions of the same packages that are called by name are gone through likewise. Functions, classes and modules
    are left out: nobody binds these anew while a model runs.

    Args:
        classes: The classes.
        functions: Functions that their objects have in attributes.
    """
    bases = {base for cls in classes for base in cls.__mro__ if is_users(base)}
    todo = [*functions]
    for base in sorted(bases, key=lambda each: (each.__module__, each.__qualname__)):
        for name, value in vars(base).items():
            if not name.startswith("__") and isinstance(value, _BOUND_ANEW):
                yield Name(base, name, f"the attribute {name!r} of class {base.__name__}")
            todo.append(value)
    yield from _named_by(todo, {_package(base) for base in bases})


def _named_by(todo: list[Any], packages: set[str]) -> Iterator[Name]:
    """What functions name, and the functions of these packages that they name."""
    seen: set[tuple[int, str]] = set()
    for function in _each_once(todo):
        known = function.__globals__
        found: list[tuple[Any, str, Any, str]]
        found = [(known, name, known.get(name), f"the global {name!r}") for name in _names_in(function.__code__)]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        found += [(c, name, c.cell_contents, f"the variable {name!r}") for name, c in cells if not _is_empty(c)]
        for owner, name, value, where in found:
            if isinstance(value, FunctionType) and _package(value) in packages:
                todo.append(value)
            elif isinstance(value, _BOUND_ANEW) and (id(owner), name) not in seen:
                seen.add((id(owner), name))
                yield Name(owner, name, where)


def _each_once(todo: list[Any]) -> Iterator[FunctionType]:
    """The functions of user code among these and inside of them; whoever asks may add more on the way."""
    gone_through: set[tuple[int, ...]] = set()
    while todo:
        function, inner = _unwrapped(todo.pop(0))
        if inner is not None:
            todo.append(inner)
        if function is None or not is_users(function):
            continue
        mark = (id(function.__code__), *map(id, function.__closure__ or ()))  # methods of many objects are one function
        if mark not in gone_through:
            gone_through.add(mark)
            yield function


def _unwrapped(value: Any) -> tuple[FunctionType | None, Any]:
    """The function that something is, and what a method, a property or a decorator has inside."""
    for kind, name in _WRAPPERS:
        if isinstance(value, kind):
            return (value if isinstance(value, FunctionType) else None), getattr(value, name, None)
    return None, None


def _names_in(code: CodeType) -> Iterator[str]:
    """Names in a function and in those that are defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", None)).partition(".")[0]


def _is_empty(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return True
    return False


def named_in_forward(classes: Iterable[type]) -> frozenset[str]:
    """All names in the `forward` of user classes, and in the methods and functions of theirs that it names."""
    found: set[str] = set()
    for cls in set(classes):
        methods: dict[str, list[Any]] = {}  # of all bases, for `super()` leads there
        for base in filter(is_users, cls.__mro__):
            for name, value in vars(base).items():
                methods.setdefault(name, []).append(value)
        todo = list(methods.get("forward", ()))
        for function in _each_once(todo):
            names = set(_names_in(function.__code__))
            found |= names
            known = function.__globals__
            todo += [method for name in names & methods.keys() for method in methods[name]]
            todo += [known[name] for name in names if _package(known.get(name)) == _package(cls)]
    return frozenset(found)
