"""The random number generators of this process's host: torch's, Python's and NumPy's own ones.

What one process draws for all, as the order of an epoch, the others have not drawn. Code that draws afterwards, such as
a choice per batch, would go its own way in each process, as it does not where every process draws the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Move(NamedTuple):
    """A generator has gone on.

    Attributes:
        name: Of the generator.
        before: Where it stood.
        after: Where it stands.
    """

    name: str
    before: Any
    after: Any


def states() -> dict[str, Any]:
    """Where the generators stand, by name, as plain data that can be compared."""
    found = {"torch": torch.get_rng_state().numpy().tobytes(), "python": random.getstate()}
    if (numpy := _numpy_state()) is not None:
        found["numpy"] = numpy
    return found


def moves_since(before: dict[str, Any]) -> list[Move]:
    """Which of them something was drawn from, since `states` gave `before`."""
    return [Move(name, before[name], now) for name, now in states().items() if before.get(name, now) != now]


def follow(moves: Sequence[Move]) -> None:
    """Let generators go on as those of another process, if they stand where those stood."""
    now = states() if moves else {}
    for name, before, after in moves:
        if now.get(name) == before:
            _SETTERS[name](after)


def _numpy_state() -> Any:
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":  # user code has put another one there
        return None
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"]


def _set_numpy(state: Any) -> None:
    key, position, has_gauss, gauss = state
    np.random.set_state(("MT19937", np.frombuffer(key, dtype=np.uint32), position, has_gauss, gauss))


_SETTERS: dict[str, Callable[[Any], None]] = {
    "torch": lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    "python": random.setstate,
    "numpy": _set_numpy,
}
