"""Random numbers that do not come from torch."""

from __future__ import annotations

import random
import sys
from typing import Any


class OtherSources:
    """The generators of Python and NumPy, as they are now. Every lane would draw from them, in no certain order."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = None if _numpy() is None else _numpy().get_state()

    def drawn(self) -> str | None:
        """What was drawn from since, in words that follow "it"; None if nothing was."""
        if self._numpy is not None and not _equal(_numpy().get_state(), self._numpy):
            return "draws random numbers from numpy.random"
        return None if random.getstate() == self._python else "draws random numbers from Python's random"

    def put_back(self) -> str | None:
        """Undo what was drawn since.

        Returns:
            As `drawn`.
        """
        drawn = self.drawn()
        if drawn is not None:
            random.setstate(self._python)
            if self._numpy is not None:
                _numpy().set_state(self._numpy)
        return drawn


def _numpy() -> Any:
    """`numpy.random` if anything has imported it; else nobody draws from it."""
    return sys.modules.get("numpy.random")


def _equal(a: Any, b: Any) -> bool:
    name, keys, *rest = a
    return bool(name == b[0] and (keys == b[1]).all() and rest == list(b[2:]))
