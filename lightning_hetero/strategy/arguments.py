"""Answers misspelt arguments with the name that was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_hetero.errors import UnknownArgumentError

_Init = TypeVar("_Init", bound=Callable[..., None])


def known_arguments_only(init: _Init) -> _Init:
    """Decorates an `__init__`.

    Raises (the decorated method):
        UnknownArgumentError: It was called with an argument that it does not have.
    """
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                meant = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {meant[0]!r}? " if meant else ""
                raise UnknownArgumentError(
                    f"{type(self).__name__} has no argument {name!r}. {hint}Its arguments are: {', '.join(known)}."
                )
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]
