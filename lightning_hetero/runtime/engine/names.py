"""Names outside of modules that their code can bind anew: attributes of classes, and globals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from lightning_hetero.runtime.engine.contents import CONTAINERS, Thing, is_users, things

_BOUND_ANEW = (*CONTAINERS, Tensor, bool, int, float, str, type(None))


class Name:
    """A name that code of user classes can bind anew: an attribute of a class, a global of its module.

    Args:
        owner: The class, or the dictionary of globals.
        name: The name.
        where: What to call it.
    """

    def __init__(self, owner: Any, name: str, where: str) -> None:
        self.where = where
        self._owner = owner
        self._name = name
        self._value = self._get()

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
        else:
            setattr(self._owner, self._name, self._value)
        return True

    def _get(self) -> Any:
        return self._owner.get(self._name) if isinstance(self._owner, dict) else vars(self._owner).get(self._name)


def names_of(classes: Iterable[type]) -> Iterator[Name]:
    """What methods of user classes may change beside their objects: attributes of the classes, and globals they name.

    Functions, classes and modules are left out: nobody binds these anew while a model runs.
    """
    bases = {base for cls in classes for base in cls.__mro__ if is_users(base)}
    for base in sorted(bases, key=lambda each: (each.__module__, each.__qualname__)):
        for name, value in vars(base).items():
            if not name.startswith("__") and isinstance(value, _BOUND_ANEW):
                yield Name(base, name, f"the attribute {name!r} of class {base.__name__}")
            code = getattr(value, "__code__", None)
            known = getattr(value, "__globals__", {})
            for each in code.co_names if code is not None else ():
                if isinstance(known.get(each), _BOUND_ANEW):
                    yield Name(known, each, f"the global {each!r}")
