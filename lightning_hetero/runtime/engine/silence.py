"""Hooks of user code on parameters are silent while lanes compute gradients: these are parts of a gradient."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
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


class _OfGradients:
    """A hook that is not called where there is no gradient."""

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, gradient: Tensor | None) -> Any:
        return None if gradient is None else self.hook(gradient)


def spare(leaves: Iterable[Tensor]) -> None:
    """Within a backward that does not reach some leaves: see to it that their hooks are not called with None.

    On one device they would not be called at all. As all parameters hang on one node, autograd asks for each of them.
    They may be reached by other ways all the same, so hooks stay where they are, until this backward has ended.
    """
    spared: list[tuple[dict[int, Any], int, _OfGradients]] = []
    for leaf in leaves:
        hooks: Any = leaf._backward_hooks
        for key, hook in list(hooks.items()) if hooks else ():
            if not isinstance(hook, (AddsAtOnce, _OfGradients)):
                hooks[key] = _OfGradients(hook)
                spared.append((hooks, key, hooks[key]))
    if not spared:
        return

    def put_back() -> None:
        for hooks, key, ours in spared:
            if hooks.get(key) is ours:
                hooks[key] = ours.hook

    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(put_back)
