"""The attributes of modules, as they were when a region was called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_MISSING = object()
_TENSORS = frozenset({Tensor})
_LEFT_ALONE = object()  # stands for a value that is not put back


class Attributes:
    """What the attributes and buffers of some modules are now: which objects, not what is inside of them.

    Args:
        modules: The modules, without those below them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # Those of a scripted module are in C++: other objects at every look.
        plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self._before = [(module, dict(module.__dict__), dict(module._buffers)) for module in plain]

    def put_back(self) -> str | None:
        """Undo changes.

        Returns:
            What was changed, in words that follow "its forward"; None if nothing was.
        """
        change = None
        for module, attributes, buffers in self._before:
            if not _same(module.__dict__, attributes):
                change = f"changes the attribute {_first(module.__dict__, attributes)!r} of {type(module).__name__}"
                _set(module.__dict__, attributes)
            if (buffers or module._buffers) and not _are_identical(module._buffers, buffers):
                change = f"changes the buffer {_first(module._buffers, buffers)!r} of {type(module).__name__}"
                _set(module._buffers, buffers)
        return change

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """Within the block, attributes and buffers are those of then; what changes them meanwhile is forgotten."""
        now = Attributes([module for module, _, _ in self._before])
        try:
            self.put_back()
            yield
        finally:
            now.put_back()

    def without_graphs(self) -> Attributes:
        """The same, to be kept for a backward, without the tensors that have a graph: these stay what they are by then.

        A module that has its last output in an attribute would else keep the graphs of all calls, each by the next one.
        """
        if all(_TENSORS.isdisjoint(map(type, attributes.values())) for _, attributes, _ in self._before):
            return self
        kept = Attributes(())
        kept._before = [(module, _without_graphs(attributes), buffers) for module, attributes, buffers in self._before]
        return kept


def _without_graphs(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _LEFT_ALONE if isinstance(value, Tensor) and value.grad_fn is not None else value
        for key, value in attributes.items()
    }


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    try:
        return bool(now == before)  # which looks at objects first, and at nothing else as long as they are the same
    except Exception:  # of tensors, which have no one answer, and of user code: they are others
        return False


def _are_identical(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether they are the same tensors: a copy with the same content is another one."""
    return now.keys() == before.keys() and all(map(is_, map(now.get, before), before.values()))


def _first(now: dict[str, Any], before: dict[str, Any]) -> str:
    return next((k for k in {**before, **now} if now.get(k, _MISSING) is not before.get(k, _MISSING)), "")


def _set(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    now.update({key: value for key, value in before.items() if value is not _LEFT_ALONE})
