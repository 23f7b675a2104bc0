"""Hooks of user code on parameters are silent while lanes compute gradients: these are parts of a gradient."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_hetero.runtime.engine.at_once import AddsAtOnce


class Silence:
    """Takes hooks off tensors, and puts them back when the last of those who wanted silence is done.

    Two calls may be in their backward at the same time, with parameters in common.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[int, int] = {}
        self._kept: dict[int, tuple[Any, dict[int, Any]]] = {}

    def begin(self, leaves: Iterable[Tensor]) -> None:
        """Take the hooks off."""
        with self._lock:
            for leaf in leaves:
                hooks: Any = leaf._backward_hooks
                if hooks:
                    # A copy: threads of other calls come and go with ours.
                    theirs = {key: each for key, each in dict(hooks).items() if type(each) is not AddsAtOnce}
                    if theirs:  # those of an earlier call are kept already, if these came later
                        self._kept.setdefault(id(leaf), (hooks, {}))[1].update(theirs)
                        for key in theirs:
                            del hooks[key]
                self._wanted[id(leaf)] = self._wanted.get(id(leaf), 0) + 1

    def end(self, leaves: Iterable[Tensor]) -> None:
        """Put them back, if nobody else needs silence."""
        with self._lock:
            for leaf in leaves:
                wanted = self._wanted.pop(id(leaf)) - 1
                if wanted:
                    self._wanted[id(leaf)] = wanted
                elif id(leaf) in self._kept:
                    hooks, kept = self._kept.pop(id(leaf))
                    hooks.update(kept)


SILENCE = Silence()  # one for all models: two of them may have parameters in common
