"""Values by which the code of modules may decide: a mode, a switch in a configuration, a global, a function to use."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from enum import Enum
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.graph.find import is_metric
from lightning_hetero.runtime.engine.contents import is_open, is_users, members
from lightning_hetero.runtime.engine.names import Reading, read_in_forward
from lightning_hetero.runtime.standin import InPlace

FLAGS = (bool, int, float, str, bytes, complex, range, Enum, type(None), torch.dtype, torch.device)
_PLAIN = frozenset({bool, int, float, str, type(None)})
_SEQUENCES = (list, tuple, deque)
_MOST_ITEMS = 64  # of a container that is looked into one by one
_MOST_FLAGS = 4096  # of one that has nothing but flags
_MOST_VALUES = 1000  # that are found for one call, beside the attributes of modules themselves
_MOST_BYTES = 1 << 12  # of an array of NumPy that is compared
_DEEPEST = 6
_NAMES_ANY = frozenset({"__dict__", "__getattribute__", "getattr", "vars"})
_NAMES_ANY_MODULE = _NAMES_ANY | {"_modules", "children", "modules", "named_children", "named_modules"}
_LEADS_AWAY = frozenset({"_metadata", "_parent"})  # of omegaconf: to what all settings are in
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)
_EVERY_MODULE_HAS = frozenset(vars(nn.Module())) - {"training"}


class Found:
    """What is there at one call.

    Attributes:
        paths: Where each value was found: the module's index or a name, and the way from there, as nested pairs.
        values: The values.
        modules: The modules that were looked at, and those that hide in their attributes.
        hidden: These alone.
        functions: Functions in attributes.
        kinds: Classes of objects in attributes.
    """

    def __init__(self, modules: Sequence[nn.Module], names: frozenset[str]) -> None:
        self.paths: list[Hashable] = []
        self.values: list[Hashable] = []
        self.modules = list(modules)
        self._given = len(self.modules)
        self.functions: list[FunctionType] = []
        self.kinds: list[type] = []
        self._names = names
        self._any = not _NAMES_ANY.isdisjoint(names)
        self._seen: set[int] = set()
        self._left = _MOST_VALUES
        self._known: set[int] | None = None

    @property
    def hidden(self) -> Sequence[nn.Module]:
        """See the class."""
        return self.modules[self._given :]

    def look_at_modules(self) -> None:
        """The attributes of all modules, those of modules that are found on the way too."""
        add_path, add_value = self.paths.append, self.values.append
        for index, module in enumerate(self.modules):  # grows on the way
            members = module.__dict__
            for name in members.keys() - _EVERY_MODULE_HAS:
                value = members[name]
                if type(value) in _PLAIN:
                    add_path((index, name))
                    add_value(value)
                elif not isinstance(value, InPlace):
                    is_named = self._any or name in self._names or name.lstrip("_") in self._names
                    self.look((index, name), value, _DEEPEST if is_named else 1)

    def look(self, path: Hashable, value: Any, depth: int) -> None:
        """One value, and what is inside."""
        if isinstance(value, FLAGS):
            self._add(path, value)
        elif depth <= 0 or isinstance(value, Tensor) or id(value) in self._seen or self._left <= 0:
            return
        else:
            self._seen.add(id(value))
            self._look_inside(path, value, depth - 1)

    def _look_inside(self, path: Hashable, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            if depth:
                self._add_module(value)
        elif isinstance(value, dict):
            if depth or type(value) is not dict:  # Lightning's `hparams` are of a class of their own
                self._look_at_dict(path, value, depth)
        elif isinstance(value, _SEQUENCES):
            if depth:
                self._look_at_sequence(path, value, depth)
        elif isinstance(value, slice):
            self._look_at_sequence(path, (value.start, value.stop, value.step), max(depth, 1))
        elif isinstance(value, (set, frozenset)):
            if depth and len(value) <= _MOST_FLAGS and _are_flags(value):
                self._add(path, frozenset(value))
        elif isinstance(value, (FunctionType, MethodType, functools.partial, BuiltinFunctionType, type)):
            self._look_at_code(path, value, depth)
        elif type(value).__module__ == "numpy":
            self._look_at_numpy(path, value)
        elif is_open(value):
            if depth:
                self.kinds.append(type(value))
                self._add((path, None), type(value))
            for name, member in members(value).items():
                if name not in _LEADS_AWAY:
                    self.look((path, name), member, depth)

    def _look_at_dict(self, path: Hashable, value: dict[Any, Any], depth: int) -> None:
        if len(value) > _MOST_ITEMS:
            if len(value) <= _MOST_FLAGS and _are_flags(dict.values(value)) and _are_flags(dict.keys(value)):
                self._add(path, tuple(dict.items(value)))
            return
        flags = tuple(
            [key for key, member in dict.items(value) if isinstance(key, FLAGS) and isinstance(member, FLAGS)]
        )
        if flags:  # not the keys of a cache of tensors
            self._add((path, None), flags)
        for key, member in list(dict.items(value)):
            self.look((path, key if isinstance(key, (str, int)) else None), member, depth)

    def _look_at_numpy(self, path: Hashable, value: Any) -> None:
        """A number of NumPy, or a small array."""
        if getattr(value, "nbytes", _MOST_BYTES) < _MOST_BYTES and hasattr(value, "tobytes"):
            self._add(path, (str(value.dtype), value.shape, value.tobytes()))

    def _look_at_sequence(self, path: Hashable, value: Sequence[Any], depth: int) -> None:
        if len(value) <= _MOST_FLAGS and _are_flags(value):
            self._add(path, tuple(value))
        elif len(value) <= _MOST_ITEMS:
            self._add((path, None), len(value))
            for index, item in enumerate(tuple(value)):
                self.look((path, index), item, depth)

    def _look_at_code(self, path: Hashable, value: Any, depth: int) -> None:
        """What a function is, and what it has with it: not where it is, for the next one may be in the same place."""
        if isinstance(value, FunctionType):
            self._add((path, None), value.__code__)
            if is_users(value):
                self.functions.append(value)
            for cell in value.__closure__ or ():
                self.look((path, None), _in_cell(cell), depth)
            for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self.look((path, None), default, depth)
        elif isinstance(value, MethodType):
            self.look((path, None), value.__func__, depth + 1)
            if not isinstance(value.__self__, nn.Module):
                self.look((path, None), value.__self__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.look((path, None), part, depth + 1)
        else:
            self._add((path, None), value)

    def _add(self, path: Hashable, value: Any) -> None:
        self._left -= 1
        self.paths.append(path)
        self.values.append(value)

    def _add_module(self, module: nn.Module) -> None:
        if self._known is None:
            self._known = {id(each) for each in self.modules}
        inside = [module] if id(module) in self._known else list(module.modules())
        if self.modules[0] in inside:
            inside = [module]  # a module above: what else is in it is not called from here
        new = [each for each in inside if id(each) not in self._known]
        self.modules += new
        self._known.update(map(id, new))


class Settings:
    """Finds these values for one region. What its code names is found out once, and again when there is new code."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._metrics: list[_Metric] = []
        self._code: set[Any] = set()
        self._reading = Reading(frozenset(), frozenset(), ())

    def look(self, modules: Sequence[nn.Module], arguments: Sequence[Any] = ()) -> Found:
        """What is there now.

        Args:
            modules: The modules of the region, itself first.
            arguments: What it is called with beside tensors. What is a flag is left to the caller.
        """
        if len(modules) != len(self._modules) or not all(map(is_, modules, self._modules)):
            self._modules, self._code = list(modules), set()
            self._metrics = list(_metrics_in(modules))
            self._reading = Reading(frozenset(), frozenset(), ())
            self._read(Found(self._of_interest(), frozenset()))
        found = self._find(arguments)
        for _ in range(_DEEPEST):  # what is found may name more
            if not self._read(found):
                break
            found = self._find(arguments)
        return found

    def name_read(self, path: Hashable, value: Any) -> str | None:
        """The name of a value by which the code may do something else whenever it changes; None if it may not.

        Args:
            path: Where `look` has found it.
            value: The value. A number that is not whole counts only where it may be compared with something: it is
                a rate or a factor else.
        """
        name = _name(path)
        names = self._reading.compared if isinstance(value, float) else self._reading.names
        return name if name in names else None

    def _of_interest(self) -> Sequence[nn.Module]:
        """All modules but metrics that the code does not name: those count what others do with them."""
        names = self._reading.names
        if not self._metrics or not _NAMES_ANY_MODULE.isdisjoint(names):
            return self._modules
        unused = {id(each) for metric in self._metrics if metric.names.isdisjoint(names) for each in metric.modules}
        return [module for module in self._modules if id(module) not in unused]

    def _find(self, arguments: Sequence[Any]) -> Found:
        found = Found(self._of_interest(), self._reading.names)
        for index, value in enumerate(arguments):
            if not isinstance(value, FLAGS):
                found.look(("given", index), value, _DEEPEST)
        found.look_at_modules()
        for each in self._reading.outside:
            found.look(("outside", each.name), each.value, _DEEPEST)
        return found

    def _read(self, found: Found) -> bool:
        """Find out what the code names. Returns whether there was any that was not known."""
        kinds = [type(module) for module in found.modules]
        code = {*kinds, *found.kinds, *(function.__code__ for function in found.functions)}
        if code <= self._code:
            return False
        self._code |= code
        self._reading = read_in_forward(kinds, found.functions, found.kinds)
        return True


class _Metric(NamedTuple):
    """A metric, or a collection of some, and by which names code gets at it."""

    names: frozenset[str]
    modules: Sequence[nn.Module]


def _metrics_in(modules: Sequence[nn.Module]) -> Iterator[_Metric]:
    named = dict(modules[0].named_modules(remove_duplicate=False))
    names: dict[int, set[str]] = {}
    for path, module in named.items():
        if is_metric(module):
            known = names.setdefault(id(module), set())
            above, _, name = path.rpartition(".")
            known.add(name)
            while above and isinstance(named[above], _CONTAINERS):  # the name is enough to get at what is in it
                above, _, name = above.rpartition(".")
                known.add(name)
    for module in modules:
        if id(module) in names:
            yield _Metric(frozenset(names[id(module)]), list(module.modules()))


def _are_flags(values: Iterable[Any]) -> bool:
    return all(kind in _PLAIN or issubclass(kind, FLAGS) for kind in set(map(type, values)))


def _in_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _name(path: Any) -> str:
    """The last name on a path."""
    while isinstance(path, tuple):
        path, last = path
        if isinstance(last, str):
            return last
    return ""
