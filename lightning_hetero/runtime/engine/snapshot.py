"""What a trial run of a module may have changed, noticed and put back."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, set, deque)
# What torch itself keeps in a module, or keeps elsewhere in this snapshot.
_IGNORED = frozenset(
    {
        "_apply",
        "_buffers",
        "_compiled_call_impl",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "forward",
        "training",
    }
)


class Snapshot:
    """Buffers, versions of parameters, and attributes of a module and all modules below it.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.named_modules())
        self._buffers = [
            [(name, buffer, None if buffer is None else buffer.detach().clone()) for name, buffer in m._buffers.items()]
            for _, m in self._modules
        ]
        self._versions = [(name, parameter, parameter._version) for name, parameter in module.named_parameters()]
        self._attributes = [
            {key: kept(value) for key, value in m.__dict__.items() if key not in _IGNORED} for _, m in self._modules
        ]

    def put_back(self) -> str | None:
        """Undo changes.

        Returns:
            What was changed, in words that follow "in training it"; None if nothing was.
        """
        change: str | None = None
        for (name, module), buffers, attributes in zip(self._modules, self._buffers, self._attributes, strict=True):
            where = name or type(module).__name__
            scripted = isinstance(module, torch.jit.ScriptModule)  # its buffers are in C++: new objects at every look
            held = dict(module._buffers.items())
            for key, buffer, value in buffers:
                now = buffer if scripted else held.get(key)
                if now is not buffer or (buffer is not None and not _equal(buffer, value)):
                    change = f"changes the buffer {key!r} of {where}"
                    if not scripted:
                        module._buffers[key] = buffer
                    if buffer is not None and value is not None:
                        buffer.copy_(value)
            for key in [key for key in module.__dict__ if key not in _IGNORED and key not in attributes]:
                change = f"sets the attribute {key!r} of {where}"
                del module.__dict__[key]
            for key, (value, kept) in attributes.items():
                if key not in module.__dict__ or module.__dict__[key] is not value or not unchanged(value, kept):
                    change = f"changes the attribute {key!r} of {where}"
                    _restore(value, kept)
                    module.__dict__[key] = value
        for name, parameter, version in self._versions:
            if parameter._version != version:
                change = f"changes the parameter {name!r}"
        return change

    def change_below(self, ignored: set[int]) -> str | None:
        """What was changed in modules below the root and in lists and the like of the root; nothing is put back.

        Args:
            ignored: `id` of modules that are not looked at.

        Returns:
            Words that follow "because"; None if nothing was changed. Buffers are not looked at.
        """
        for depth, ((name, module), attributes) in enumerate(zip(self._modules, self._attributes, strict=True)):
            if id(module) in ignored:
                continue
            for key, (value, copied) in attributes.items():
                if depth and module.__dict__.get(key) is not value:
                    return f"{name}.{key} is set"
                if isinstance(value, (*CONTAINERS, Tensor)) and not unchanged(value, copied):
                    return f"the content of {name + '.' if name else 'self.'}{key} is changed"
            if depth and any(key not in attributes for key in module.__dict__ if key not in _IGNORED):
                return f"{name} gets a new attribute"
        return None


def kept(value: Any) -> tuple[Any, Any]:
    """A value, and what is needed to see and undo changes inside it."""
    if isinstance(value, Tensor):
        return value, value.detach().clone()
    if isinstance(value, CONTAINERS):
        return value, copy.copy(value)
    return value, None


def unchanged(value: Any, kept: Any) -> bool:
    """Whether what is inside a value is what `kept` has kept of it."""
    if isinstance(value, Tensor):
        return _equal(value, kept)
    if isinstance(value, dict):
        return value.keys() == kept.keys() and all(value[key] is kept[key] for key in kept)
    if isinstance(value, (list, deque)):
        return len(value) == len(kept) and all(a is b for a, b in zip(value, kept, strict=True))
    if isinstance(value, set):
        return bool(value == kept)
    return True


def _restore(value: Any, kept: Any) -> None:
    if isinstance(value, Tensor):
        if not _equal(value, kept):
            value.detach().copy_(kept)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(kept)
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(kept)


def _equal(a: Tensor, b: Any) -> bool:
    # Bit patterns, so that a nan is equal to itself.
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
