"""What is inside of the attributes of modules: found, kept, compared and put back."""

from __future__ import annotations

import copy
import functools
import io
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hetero.runtime.transfer import version_of

CONTAINERS = (list, dict, set, deque)
# Objects of these packages are not looked into: a Trainer leads to everything.
_FOREIGN = frozenset(
    {
        "lightning",
        "lightning_fabric",
        "lightning_hetero",
        "builtins",
        "logging",
        "numba",
        "pathlib",
        "pytorch_lightning",
        "threading",
        "torch",
        "triton",
        "weakref",
    }
)
_CLOSED = (type, nn.Module, Dataset, DataLoader, str, bytes, int, float, complex, type(None))
# Code, whose attributes say something about it, and classes; other objects that can be called may keep state.
_CODE = (type, FunctionType, BuiltinFunctionType, MethodType, functools.partial, type(functools.cache(len)))
_SLOTS: WeakKeyDictionary[type, dict[str, MemberDescriptorType]] = WeakKeyDictionary()
LARGE = 64
_MOST_THINGS = 20_000
_MOST_BYTES = 64 << 20  # of a tensor or array inside of something else that is copied


class Thing(NamedTuple):
    """Something that can change inside, and what was in it.

    Attributes:
        module: Name of the module that has it.
        key: Name of the module's attribute that leads to it.
        value: The thing.
        content: What was in it, as `content` gave it; None for an iterator, of which nobody knows how far it is.
    """

    module: str
    key: str
    value: Any
    content: Any


def things(
    module: str, key: str, value: Any, seen: set[int], *, may_be_large: bool = True
) -> Iterator[Thing | nn.Module]:
    """Everything that can change inside of an attribute; modules are handed out and not looked into.

    Args:
        module: Name of the module.
        key: Name of the attribute.
        value: The attribute.
        seen: `id` of what was found already; filled.
        may_be_large: Whether the attribute itself is copied whatever its size.
    """
    todo = [value]
    while todo and len(seen) < _MOST_THINGS:
        found = todo.pop()
        if id(found) in seen or (isinstance(found, _CLOSED) and not isinstance(found, nn.Module)):
            continue
        seen.add(id(found))
        if isinstance(found, nn.Module):
            yield found
        elif isinstance(found, tuple):
            todo += found
        elif isinstance(found, (MethodType, BuiltinFunctionType)):  # `append` of a list, say
            todo.append(found.__self__)
        elif isinstance(found, FunctionType) and is_users(found):
            todo += (cell.cell_contents for cell in found.__closure__ or () if not is_empty(cell))
        elif isinstance(found, functools.partial):
            todo += (found.func, *found.args, *found.keywords.values())
        else:
            kept = content(found, may_be_large=may_be_large and found is value)
            if kept is not None or is_iterator(found):
                yield Thing(module, key, found, kept)
            if isinstance(kept, dict):
                todo += kept.values()
            elif isinstance(kept, (list, set, deque)):
                todo += kept


def content(value: Any, *, may_be_large: bool) -> Any:
    """A copy of what can change in a value; None if nothing can, or nothing that is known here."""
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided and not (value.is_nested or value.is_quantized or value.is_meta)
        is_copied = is_plain and not isinstance(value, nn.Parameter)
        is_copied = is_copied and (may_be_large or value.numel() * value.element_size() <= _MOST_BYTES)
        return version_of(value), value.detach().clone() if is_copied else None
    if isinstance(value, CONTAINERS):
        return _copied(value)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return value.copy() if value.nbytes <= _MOST_BYTES else None
        if isinstance(value, numpy.random.Generator):
            return copy.deepcopy(value.bit_generator.state)
        if isinstance(value, numpy.random.RandomState):
            return value.get_state(legacy=False)
    return members(value) if is_open(value) else None


def is_same(value: Any, kept: Any, *, quickly: bool = False) -> bool:
    """Whether in a value there is what there was.

    Args:
        value: The value.
        kept: What `content` gave for it.
        quickly: Whether to trust the counter of changes of tensors, to look at no more than the size of large
            containers, and to leave out arrays and generators.
    """
    if isinstance(value, Tensor):
        before, clone = kept
        return version_of(value) == before if quickly or clone is None else equal(value, clone)
    if isinstance(value, CONTAINERS) and (len(value) != len(kept) or (quickly and len(kept) > LARGE)):
        return len(value) == len(kept)
    if isinstance(value, dict):
        return dict.keys(value) == kept.keys() and all(dict.__getitem__(value, key) is kept[key] for key in kept)
    if isinstance(value, (list, deque)):
        return all(a is b for a, b in zip(_kind(value).__iter__(value), kept, strict=True))
    if isinstance(value, set):
        return bool(value == kept)
    if is_open(value):
        now = members(value)
        return now.keys() == kept.keys() and all(now[key] is kept[key] for key in kept)
    if quickly:
        return True
    if isinstance(value, torch.Generator):
        return torch.equal(value.get_state(), kept)
    if isinstance(value, random.Random):
        return bool(value.getstate() == kept)
    if type(value).__name__ == "ndarray":
        return bool(value.tobytes() == kept.tobytes())
    if type(value).__name__ == "RandomState":
        return repr(value.get_state(legacy=False)) == repr(kept)
    return repr(value.bit_generator.state) == repr(kept)


def put_back(value: Any, kept: Any) -> None:
    """Undo changes inside of a value."""
    if isinstance(value, Tensor):
        _, clone = kept
        if clone is not None:
            value.detach().copy_(clone)
    elif isinstance(value, CONTAINERS):
        kind = _kind(value)
        kind.clear(value)
        if kind in (list, deque):
            kind.extend(value, kept)
        else:
            kind.update(value, kept)
    elif isinstance(value, torch.Generator):
        value.set_state(kept)
    elif isinstance(value, random.Random):
        value.setstate(kept)
    elif is_open(value):
        _set_members(value, kept)
    elif type(value).__name__ == "ndarray":
        value[...] = kept
    elif type(value).__name__ == "RandomState":
        value.set_state(kept)
    else:
        value.bit_generator.state = kept


def _kind(value: Any) -> Any:
    """The class of Python that a container is of, whose methods do what they say.

    Those of a class of user code may do anything: a table that makes an object whenever somebody looks one up.
    """
    return next(kind for kind in (OrderedDict, *CONTAINERS) if isinstance(value, kind))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: dict.__getitem__(value, key) for key in _kind(value).__iter__(value)}
    kind = _kind(value)
    return kind(kind.__iter__(value))


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same content; a nan is equal to itself."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def is_empty(cell: CellType) -> bool:
    """Whether a variable of a function around has no value (yet)."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def is_open(value: Any) -> bool:
    """Whether it is an object of user code with attributes of its own, which may be one that can be called."""
    if isinstance(value, (random.Random, nn.Module, *_CODE)):
        return False
    return is_users(type(value)) and (hasattr(value, "__dict__") or bool(_slots(type(value))))


def is_iterator(value: Any) -> bool:
    """Whether it goes on where it is asked and cannot be put back: a generator, `itertools.cycle`, a `map`."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase) and not is_open(value)


def members(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in `__slots__` too."""
    found = dict(getattr(value, "__dict__", ()))
    for name, slot in _slots(type(value)).items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:  # that has no value yet
            continue
    return found


def _set_members(value: Any, kept: dict[str, Any]) -> None:
    slots = _slots(type(value))
    for name, slot in slots.items():  # not by `setattr`, which a class may forbid or change
        if name in kept:
            slot.__set__(value, kept[name])
        elif name in members(value):
            slot.__delete__(value)
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update({name: each for name, each in kept.items() if name not in slots})


def _slots(kind: type) -> dict[str, MemberDescriptorType]:
    """What a class of user code and its bases have in `__slots__`, by the name that it has in the class."""
    known = _SLOTS.get(kind)
    if known is None:
        bases = [base for base in kind.__mro__[::-1] if "__slots__" in vars(base) and is_users(base)]
        found = [(name, slot) for base in bases for name, slot in vars(base).items()]
        known = _SLOTS[kind] = {name: slot for name, slot in found if isinstance(slot, MemberDescriptorType)}
    return known


def is_users(thing: Any) -> bool:
    """Whether a class or function is one of user code."""
    return is_users_package(thing.__module__)


def is_users_package(name: object) -> bool:
    """Whether a module of Python of that name is one of user code."""
    return str(name).partition(".")[0] not in _FOREIGN
