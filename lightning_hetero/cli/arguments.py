"""Numbers and words that a configuration gives to a class, held against the types that the class declares."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object

from lightning_hetero.errors import UsageError

_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def check_arguments(group: str, given: Mapping[str, Any]) -> None:
    """Refuse a value of a type that the class does not take, which it would notice late or never.

    Only numbers, words, booleans and null are looked at, and only where nothing else is declared: a class that takes
    more is asked itself.

    Args:
        group: Name of the group, for the message.
        given: Its configuration, with a `_target_`.

    Raises:
        UsageError: A value has another type than its argument.
    """
    taken = _types_of(str(given.get("_target_")))
    for name, value in given.items():
        allowed = taken.get(str(name))
        if not allowed or type(value) not in _SCALARS or isinstance(value, allowed):
            continue
        if isinstance(value, int) and float in allowed:
            continue
        words = " or ".join(text for kind, text in _SCALARS.items() if kind in allowed)
        raise UsageError(f"{group}.{name}={value!r} must be {words}")


def _types_of(target: str) -> dict[str, tuple[type, ...]]:
    """The declared types of all arguments for which these are scalars; nothing of a target that does not say.

    The type of the default counts as declared: people write `hidden: int = None`.
    """
    try:
        factory = get_object(target)
        function = factory.__init__ if inspect.isclass(factory) else factory
        hints = get_type_hints(inspect.unwrap(function))
        parameters = inspect.signature(factory).parameters
    except Exception:  # it is imported by hydra next, which says what is wrong
        return {}
    found = {}
    for name, hint in hints.items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if name in parameters and all(kind in _SCALARS for kind in kinds):
            default = parameters[name].default
            found[name] = kinds if default is inspect.Parameter.empty else (*kinds, type(default))
    return found
