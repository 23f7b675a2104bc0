"""Names outside of modules that their code can bind anew: attributes of classes, and globals."""

from __future__ import annotations

import dis
import functools
import random
import sys
import threading
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import (
    CONTAINERS,
    Thing,
    is_empty,
    is_iterator,
    is_open,
    is_users,
    is_users_package,
    things,
)

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


# Functions that go one way or another by what they are given.
_DECIDING = frozenset({"bool", "ceil", "clamp", "clip", "floor", "int", "max", "min", "round", "sign"})
_MISSING = object()  # what a name is bound to that is not there
_NOT_CALLED = {"__init__", "__new__", "__repr__", "__setattr__", "__init_subclass__", "__reduce__", "__deepcopy__"}


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
    def name(self) -> str:
        """The name."""
        return self._name

    @property
    def value(self) -> Any:
        """What it is bound to at this moment; None if to nothing."""
        now = self._get()
        return None if now is _MISSING else now

    @property
    def things(self) -> Iterator[Thing]:
        """What can change inside, and iterators."""
        return (thing for thing in self._found() if isinstance(thing, Thing))

    @property
    def modules(self) -> Iterator[nn.Module]:
        """Those that it is bound to, or that are inside."""
        return (thing for thing in self._found() if isinstance(thing, nn.Module))

    def _found(self) -> Iterator[Thing | nn.Module]:
        if self._value is _MISSING:
            return iter(())
        return things(self.where, self._name, self._value, set(), may_be_large=False)

    def put_back(self) -> bool:
        """Undo a change. Returns whether there was one."""
        if self._get() is self._value:
            return False
        is_missing = self._value is _MISSING
        if isinstance(self._owner, CellType):
            if is_missing:
                del self._owner.cell_contents
            else:
                self._owner.cell_contents = self._value
        elif isinstance(self._owner, dict):
            if is_missing:
                self._owner.pop(self._name, None)
            else:
                self._owner[self._name] = self._value
        elif is_missing:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._value)
        return True

    def _get(self) -> Any:
        if isinstance(self._owner, CellType):
            return _MISSING if is_empty(self._owner) else self._owner.cell_contents
        return (self._owner if isinstance(self._owner, dict) else vars(self._owner)).get(self._name, _MISSING)


def names_of(classes: Iterable[type], functions: Iterable[Any] = ()) -> Iterator[Name]:
    """What code of user classes may change beside their objects.

    That is attributes of the classes, and what their methods name: globals, and variables of functions around them.
    Functions of the same packages, and of other files of the user's, that are called by name are gone through likewise;
    and what they name in modules, classes and functions. These themselves are left out: nobody binds them anew while a
    model runs.

    Args:
        classes: The classes.
        functions: Functions that their objects have in attributes.
    """
    bases = {base for cls in classes for base in cls.__mro__ if is_users(base)}
    todo = [*functions]
    for base in sorted(bases, key=lambda each: (each.__module__, each.__qualname__)):
        todo += vars(base).values()
        inherited = {name: value for each in base.__mro__[::-1] if each in bases for name, value in vars(each).items()}
        for name, value in inherited.items():  # `type(self).name = ...` sets what a base has in the class itself
            if not name.startswith("__") and _is_bound_anew(value):
                yield Name(base, name, f"the attribute {name!r} of class {base.__name__}")
    yield from _named_by(todo, {_package(base) for base in bases})


def _named_by(todo: list[Any], packages: set[str]) -> Iterator[Name]:
    """What functions name, and the functions of these packages that they name."""
    seen: set[tuple[int, str]] = set()
    functions: set[int] = set()  # of autograd, gone through
    for function in _each_once(todo):
        known = function.__globals__
        found: list[tuple[Any, str, Any, str]]
        found = [(known, name, known.get(name), f"the global {name!r}") for name in _names_in(function.__code__)]
        found += [
            (owner, name, vars(owner).get(name) if isinstance(owner, type) else owner.get(name), where)
            for owner, name, where in _in_owners(_named_directly(function), set(_names_in(function.__code__)))
        ]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        found += [(c, name, c.cell_contents, f"the variable {name!r}") for name, c in cells if not is_empty(c)]
        for owner, name, value, where in found:
            if isinstance(value, FunctionType):
                if _is_own(value, packages):
                    todo.append(value)
            elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
                for base in (base for base in value.__mro__ if is_users(base) and id(base) not in functions):
                    functions.add(id(base))
                    todo += vars(base).values()  # torch calls `forward` and `backward` by `apply`
                    of_class = [(each, it) for each, it in vars(base).items() if not each.startswith("__")]
                    for each in (each for each, it in of_class if _is_bound_anew(it)):
                        yield Name(base, each, f"the attribute {each!r} of class {base.__name__}")
            elif (_is_bound_anew(value) or isinstance(value, nn.Module)) and (id(owner), name) not in seen:
                seen.add((id(owner), name))
                yield Name(owner, name, where)


def _named_directly(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names, and the variables of functions around it."""
    known = function.__globals__
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return {
        **{name: known[name] for name in set(_names_in(function.__code__)) & known.keys()},
        **{name: cell.cell_contents for name, cell in cells if not is_empty(cell)},
    }


def _in_owners(known: Mapping[str, Any], names: Set[str]) -> Iterator[tuple[Any, str, str]]:
    """Owners, names and what to call them, of what code names in modules, in classes and in attributes of functions.

    Args:
        known: What it names directly, as `_named_directly` gives it.
        names: All that it names.
    """
    seen: set[int] = set()
    todo = list(known.items())
    while todo:
        path, owner = todo.pop()
        if not isinstance(owner, (ModuleType, type, FunctionType)) or id(owner) in seen or not _has_settings(owner):
            continue
        seen.add(id(owner))
        for name in names & vars(owner).keys():
            yield owner if isinstance(owner, type) else vars(owner), name, f"{path}.{name}"
            todo.append((f"{path}.{name}", vars(owner)[name]))  # classes of settings within each other, or in modules


def _is_own(value: Any, packages: Container[str]) -> bool:
    """Whether a function belongs to user code: to one of the packages, or to a file that nobody has installed."""
    package = _package(value)
    return package in packages or (package not in sys.stdlib_module_names and _is_of_a_file_of_the_user(package))


@functools.lru_cache(maxsize=1024)
def _is_of_a_file_of_the_user(package: str) -> bool:
    module = sys.modules.get(package)
    if module is None or package in ("torch", "lightning_hetero"):
        return False
    places = [getattr(module, "__file__", None) or "", *(getattr(module, "__path__", None) or ())]
    return any(places) and not any("-packages" in place for place in places)  # site-packages, dist-packages


def _is_bound_anew(value: Any) -> bool:
    return isinstance(value, _BOUND_ANEW) or is_open(value) or is_iterator(value) or _is_of_numpy(value)


def _is_of_numpy(value: Any) -> bool:
    """Whether it is an array, a number or a generator of NumPy."""
    return type(value).__module__.partition(".")[0] == "numpy"


def _each_once(todo: list[Any]) -> Iterator[FunctionType]:
    """The functions of user code among these and inside of them; whoever asks may add more on the way."""
    gone_through: set[tuple[int, ...]] = set()
    while todo:
        function, inner = _unwrapped(todo.pop(0))
        if inner is not None:
            todo.append(inner)
        if function is None or not (is_users(function) and is_users_package(function.__globals__.get("__name__"))):
            continue  # a decorator of torch, say, gives its functions the names of others
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
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return str(name).partition(".")[0]


def named_in_forward(classes: Iterable[type]) -> frozenset[str]:
    """All names in the `forward` of user classes, and in the methods and functions of theirs that it names."""
    return frozenset(name for function in _reached(classes) for name in _names_in(function.__code__))


def asks_for_gradients(classes: Iterable[type]) -> str | None:
    """Name of a function of user classes, or of one that they name, which calls `torch.autograd.grad`; None if none is.

    Args:
        classes: The classes. All their methods are looked at.
    """
    classes = set(classes)
    methods = [value for cls in classes for base in cls.__mro__ if is_users(base) for value in vars(base).values()]
    for function in _reached(classes, methods):
        names, known = set(_names_in(function.__code__)), function.__globals__
        if names >= {"autograd", "grad"} or any(known.get(name) is torch.autograd.grad for name in names):
            return function.__qualname__
    return None


class Reading(NamedTuple):
    """What the `forward` of some classes, and what it calls, may look at.

    Attributes:
        names: All names, and all texts, which may be names or keys.
        compared: Those that stand in functions that compare something or decide by it.
        outside: Attributes of classes, globals and variables of functions around.
    """

    names: frozenset[str]
    compared: frozenset[str]
    outside: Sequence[Name]


def read_in_forward(
    classes: Iterable[type], functions: Iterable[Any] = (), helpers: Iterable[type] = (), start: str = "forward"
) -> Reading:
    """What the `forward` of user classes may look at.

    Args:
        classes: The classes of modules.
        functions: Functions that modules have in attributes.
        helpers: Classes of objects that modules have.
        start: Name of the method; another one than `forward` counts beside it.
    """
    classes, helpers = set(classes), set(helpers)
    names, compared = set[str](), set[str]()
    outside: dict[tuple[int, str], Name] = {}
    for function in _reached(classes, functions, helpers, start):
        code, known = function.__code__, function.__globals__
        here = {*_names_in(code), *_texts_in(code)}
        names |= here
        compared |= here if _decides(code) else set()
        found: list[tuple[Any, str, str]]
        found = [(known, name, f"the global {name!r}") for name in here & known.keys()]
        found += _in_owners(_named_directly(function), here)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
        found += [(cell, name, f"the variable {name!r}") for name, cell in cells]
        for owner, name, where in found:
            outside.setdefault((id(owner), name), Name(owner, name, where))
    for cls in classes | helpers:
        bases = [base for base in cls.__mro__ if is_users(base)]
        for name in {name for base in bases for name in names & vars(base).keys() if _is_setting(vars(base)[name])}:
            for base in bases:  # those that lack it too: it may be set there later
                outside[id(base), name] = Name(base, name, f"the attribute {name!r} of class {base.__name__}")
    may_change = [each for each in outside.values() if not each.name.startswith("__") and _is_setting(each.value)]
    return Reading(frozenset(names), frozenset(compared), may_change)


def _is_setting(value: Any) -> bool:
    return isinstance(value, (tuple, frozenset)) or _is_bound_anew(value)


def _has_settings(owner: ModuleType | type | FunctionType) -> bool:
    package = str(owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).partition(".")[0]
    return package not in sys.stdlib_module_names and package not in ("torch", "numpy", "lightning_hetero")


def _reached(
    classes: Iterable[type],
    functions: Iterable[Any] = (),
    helpers: Iterable[type] = (),
    start: str = "forward",
) -> Iterator[FunctionType]:
    """The `forward` of user classes, and the methods and functions of theirs that it names."""
    methods: dict[str, list[Any]] = {}  # of all bases, for `super()` leads there
    classes, helpers = set(classes), set(helpers)
    users = {base for cls in classes | helpers for base in cls.__mro__ if is_users(base)}
    for base in sorted(users, key=lambda each: (each.__module__, each.__qualname__)):
        for name, value in vars(base).items():
            methods.setdefault(name, []).append(value)
    packages = {_package(base) for base in users}
    todo = [*functions, *methods.get("forward", ()), *methods.get(start, ())]
    for helper in helpers:  # Python calls these without naming them
        own = [(name, value) for base in helper.__mro__ if is_users(base) for name, value in vars(base).items()]
        todo += [value for name, value in own if name.startswith("__") and name not in _NOT_CALLED]
    for function in _each_once(todo):
        yield function
        names = set(_names_in(function.__code__))
        todo += [method for name in names & methods.keys() for method in methods[name]]
        called = [*_named_directly(function).values()]
        for module in [each for each in called if isinstance(each, ModuleType)]:
            if _is_own(module, packages):
                called += [vars(module)[name] for name in names & vars(module).keys()]
        todo += [each for each in called if callable(each) and _is_own(each, packages)]


def _texts_in(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _texts_in(constant)


@functools.lru_cache(maxsize=4096)  # each trial asks for all that a model's code calls
def _decides(code: CodeType) -> bool:
    """Whether it compares anything, or goes one way or another."""
    found = not _DECIDING.isdisjoint(code.co_names) or any(
        each.opname in ("COMPARE_OP", "CONTAINS_OP") or "IF_TRUE" in each.opname or "IF_FALSE" in each.opname
        for each in dis.get_instructions(code)
    )
    return found or any(_decides(constant) for constant in code.co_consts if isinstance(constant, CodeType))
