"""What a forward depends on besides inputs and parameters, as it was, for a second run of it in the backward.

User code may set a mode, a switch in a configuration, or a global around a call. When the forward runs again, all that
may be something else. What can be put back for a while is put back; a tensor that was changed in place is not.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hetero.runtime.engine import contents
from lightning_hetero.runtime.engine.attributes import Attributes
from lightning_hetero.runtime.engine.names import read_in_forward
from lightning_hetero.runtime.transfer import version_of

_MISSING = object()  # what a name is bound to that is not there
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_NAMES_ANY = frozenset({"__dict__", "__getattribute__", "getattr", "vars"})
_HOLDS_NOTHING = frozenset({bool, bytes, complex, float, int, str, type(None), torch.device, torch.dtype, torch.Size})
# Random numbers have their own way, modules are asked one by one, and data do not change.
_LEFT_OUT: tuple[type, ...] = (nn.Module, type, torch.Generator, random.Random, Dataset, DataLoader)
_MOST_THINGS = 500  # that are looked into for each call
_MOST_ITEMS = 1000  # of a container that is looked into
_MOST_BYTES = 1 << 16  # of an array that is copied for each call


class Surroundings:
    """Attributes of modules, what is inside of them, and names outside that their code can bind anew, as of now.

    Args:
        modules: The modules, without those below them.
        attributes: Those of the modules, if somebody has them already.
    """

    def __init__(self, modules: Sequence[nn.Module], attributes: Attributes | None = None) -> None:
        self._attributes = (attributes or Attributes(modules)).without_graphs()
        self._modules = modules
        self._named = _named(frozenset(map(type, modules)), *_in_attributes(modules))
        outside = [_Binding(owner, name, _bound(owner, name)) for owner, name in self._named.outside]
        bindings = [each for each in outside if not _has_graph(each.value)]
        users = self._named.users
        inside = [
            value
            for module in modules
            if type(module) in users
            for _, value in self._named.attributes(module)
            if type(value) not in _HOLDS_NOTHING
        ]
        things, self._tensors = _walk([*inside, *(binding.value for binding in bindings)])
        self._places: list[_Place] = [*bindings, *things]
        self._versions = [version_of(tensor) for tensor in self._tensors]

    @property
    def lost(self) -> tuple[str, str] | None:
        """The owner and the name of a tensor that was changed in place since then; None if they can be as they were."""
        if not self._tensors or self._versions == [version_of(tensor) for tensor in self._tensors]:
            return None
        changed = {id(t) for t, version in zip(self._tensors, self._versions, strict=True) if version_of(t) != version}
        for module in [each for each in self._modules if type(each) in self._named.users]:
            for name, value in self._named.attributes(module):
                if changed.intersection(map(id, _walk([value])[1])):
                    return type(module).__name__, name
        return type(self._modules[0]).__name__, "outside of it"

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Within the block, everything is as it was then; what changes it meanwhile is forgotten.

        Raises:
            RuntimeError: Another second run is under way that needs them otherwise.
        """
        with _in_effect(self._places), self._attributes.in_effect():
            yield


class _Named(NamedTuple):
    """What the code of some classes names.

    Attributes:
        inside: Names of attributes; None if it may be any.
        outside: Owners and names of what is outside of modules.
        users: The classes that are of user code, in whose objects there may be something.
    """

    inside: frozenset[str] | None
    outside: Sequence[tuple[Any, str]]
    users: frozenset[type]

    def attributes(self, module: nn.Module) -> list[tuple[str, Any]]:
        """The attributes of a module that may hold something, as far as they are named."""
        members = module.__dict__
        named = members.keys() - _EVERY_MODULE_HAS if self.inside is None else members.keys() & self.inside
        return [(name, members[name]) for name in named]


@lru_cache(maxsize=1024)  # asked for each module in each call
def _is_users(kind: type) -> bool:
    return contents.is_users(kind)


def _in_attributes(modules: Iterable[nn.Module]) -> tuple[frozenset[FunctionType], frozenset[type]]:
    """Functions that modules of user code have in attributes, and the classes of objects that they have there.

    Without those that are made within others: with what is around them they would be kept, as long as this is known.
    """
    values = [
        value
        for module in modules
        if _is_users(type(module))  # type: ignore[arg-type]  # mypy takes the hash of a class for that of its objects
        for value in map(module.__dict__.get, module.__dict__.keys() - _EVERY_MODULE_HAS)
        if type(value) not in _HOLDS_NOTHING
    ]
    functions = frozenset(value for value in values if isinstance(value, FunctionType) and not value.__closure__)
    return functions, frozenset(type(value) for value in values if contents.is_open(value))


@lru_cache(maxsize=256)
def _named(classes: frozenset[type], functions: frozenset[FunctionType], helpers: frozenset[type]) -> _Named:
    """What their `forward` names, found once: it takes a thousand times as long as a look at what these are."""
    reading = read_in_forward(classes, functions, helpers)
    inside = None if reading.names & _NAMES_ANY else reading.names - _EVERY_MODULE_HAS
    outside = [(each._owner, each.name) for each in reading.outside if _can_be_bound(each._owner)]
    return _Named(inside, outside, frozenset(filter(contents.is_users, classes)))


def _walk(values: Iterable[Any]) -> tuple[list[_Inside], list[Tensor]]:
    """Everything that can change inside of some values: what can be put back, and tensors."""
    todo = list(values)
    things: list[_Inside] = []
    tensors: list[Tensor] = []
    seen: set[int] = set()
    while todo and len(seen) < _MOST_THINGS:
        value = todo.pop()
        if type(value) in _HOLDS_NOTHING or id(value) in seen or isinstance(value, _LEFT_OUT):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.grad_fn is None:  # what has a graph would keep it
                tensors.append(value)
        elif isinstance(value, tuple):
            todo += value
        elif isinstance(value, MethodType):
            todo.append(value.__self__)
        elif isinstance(value, partial):
            todo += (value.func, *value.args, *value.keywords.values())
        elif _is_small(value):
            kept = contents.content(value, may_be_large=False)
            inside = _inside(kept)
            if kept is not None and not any(map(_has_graph, inside)):
                things.append(_Inside(value, kept))
                todo += inside
    return things, tensors


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _is_small(value: Any) -> bool:
    if isinstance(value, contents.CONTAINERS):
        return len(value) <= _MOST_ITEMS
    numpy = sys.modules.get("numpy")
    if numpy is not None and type(value).__module__.partition(".")[0] == "numpy":
        return isinstance(value, numpy.ndarray) and value.nbytes <= _MOST_BYTES
    return True


def _inside(kept: Any) -> Iterable[Any]:
    if isinstance(kept, dict):
        return kept.values()
    return kept if isinstance(kept, (*contents.CONTAINERS, tuple)) else ()


class _Inside(NamedTuple):
    """Something that can change inside, and what was in it."""

    value: Any
    content: Any

    @property
    def key(self) -> Hashable:
        return id(self.value)

    def now(self) -> _Inside:
        return _Inside(self.value, contents.content(self.value, may_be_large=False))

    def holds(self) -> bool:
        return contents.is_same(self.value, self.content)

    def put_back(self) -> None:
        members = self.value if isinstance(self.value, dict) else getattr(self.value, "__dict__", None)
        if isinstance(members, dict) and isinstance(self.content, dict) and list(members) == list(self.content):
            dict.update(members, self.content)  # at no moment something is missing, for others may be reading
        else:
            contents.put_back(self.value, self.content)


class _Binding(NamedTuple):
    """A name outside of modules, and what it was bound to: a global, an attribute of a class, a variable around."""

    owner: Any
    name: str
    content: Any

    @property
    def value(self) -> Any:
        return self.content

    @property
    def key(self) -> Hashable:
        return id(self.owner), self.name

    def now(self) -> _Binding:
        return _Binding(self.owner, self.name, _bound(self.owner, self.name))

    def holds(self) -> bool:
        return _bound(self.owner, self.name) is self.content

    def put_back(self) -> None:
        if isinstance(self.owner, CellType):
            self.owner.cell_contents = self.content
        elif isinstance(self.owner, dict):
            if self.content is _MISSING:
                self.owner.pop(self.name, None)
            else:
                self.owner[self.name] = self.content
        elif self.content is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.content)


_Place = _Inside | _Binding


def _bound(owner: Any, name: str) -> Any:
    if isinstance(owner, CellType):
        return owner.cell_contents
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _MISSING)


def _can_be_bound(owner: Any) -> bool:
    if isinstance(owner, CellType):
        try:
            return owner.cell_contents is not _MISSING
        except ValueError:  # a variable that has no value yet
            return False
    return isinstance(owner, (dict, type))


# What several modules share (a configuration, a global) several devices may need as it was at the same time.


@dataclass
class _Active:
    """A place that second runs depend on at this moment.

    Attributes:
        then: What they need.
        now: What it has to be again after the last of them.
        users: How many there are.
    """

    then: _Place
    now: _Place
    users: int = 0


_LOCK = threading.Lock()
_ACTIVE: dict[Hashable, _Active] = {}


@contextmanager
def _in_effect(places: Sequence[_Place]) -> Iterator[None]:
    entered: list[_Active] = []
    try:
        if places:
            with _LOCK:
                for place in places:  # some of them, if one raises
                    entered.append(_entered(place))
        yield
    finally:
        if entered:
            with _LOCK:
                for active in reversed(entered):
                    _leave(active)


def _entered(place: _Place) -> _Active:
    active = _ACTIVE.get(place.key)
    if active is None:
        active = _ACTIVE[place.key] = _Active(place, place.now())
        if not place.holds():
            place.put_back()
    elif not _is_same(active.then.content, place.content):
        raise RuntimeError(
            "two calls whose backwards run their forwards again at the same time need other values of the same "
            f"{type(place.value).__name__}. Call backward before it is changed."
        )
    active.users += 1
    return active


def _leave(active: _Active) -> None:
    active.users -= 1
    if not active.users:
        del _ACTIVE[active.then.key]
        if not active.now.holds():
            active.now.put_back()


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same_item(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same_item, one, other))
    return _is_same_item(one, other)


def _is_same_item(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # of arrays, and of user code
        return False
