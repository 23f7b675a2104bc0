"""Methods that stand back where somebody has put another object in the place of the host's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replaceable:
    """Decorates a method that does more than the method of the host's class that it takes the place of.

    Tests of users, and Lightning's own, watch a run with `mock.patch.object(Strategy, "backward",
    wraps=trainer.strategy.backward)`, and ask `trainer.strategy.backward` how often it was called. So what
    becomes no method but stands for that of the host (a mock) is what anybody gets; what it wraps is this method.

    Args:
        method: The method.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self._method
        above = _above(type(instance), self._owner, self._name)
        return self._method.__get__(instance, owner) if _is_method(above) else above


def replaced(owner: type, instance: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """What `super().name` is in a method of `owner` that is `Replaceable`; `original` where that is a mock."""
    above = _above(type(instance), owner, name)
    bound: Callable[..., Any] = (above if _is_method(above) else original).__get__(instance, type(instance))
    return bound


def _is_method(value: Any) -> bool:
    """Whether it becomes a method of an object whose class has it: functions do, and what tracers put around them."""
    return hasattr(type(value), "__get__")


def _above(cls: type, owner: type, name: str) -> Any:
    """What has this name in the first class after `owner`."""
    later = cls.__mro__[cls.__mro__.index(owner) + 1 :]
    return next(vars(each)[name] for each in later if name in vars(each))
