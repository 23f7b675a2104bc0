"""Twins of a module: one for each micro-batch, so that what user code writes to `self` does not reach the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_hetero.runtime.engine.snapshot import CONTAINERS, kept, unchanged

# Kept by torch, and the same objects for all twins.
_SHARED = frozenset({"_parameters", "_buffers", "_modules"})


def twin_of(module: nn.Module, without: Mapping[str, Any]) -> nn.Module:
    """A new object of the module's class with the same parameters, buffers, submodules and attributes.

    Args:
        module: The module.
        without: Attributes that the twin is not to have, or is to have with another value.
    """
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name, value in without.items():
        twin.__dict__.pop(name, None)
        if value is not None:
            twin.__dict__[name] = value
    return twin


class Writes:
    """What user code did to the attributes of a twin, compared with its module.

    Args:
        module: The module, before the twin was used.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = {name: kept(value) for name, value in module.__dict__.items() if name not in _SHARED}

    def of(self, twin: nn.Module, ignored: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes that were set, with their values."""
        return {
            name: value
            for name, value in twin.__dict__.items()
            if name not in _SHARED
            and name not in ignored
            and (name not in self._before or self._before[name][0] is not value)
        }

    def changed_in_place(self) -> str | None:
        """Name of an attribute whose content was changed: lists and the like belong to all twins."""
        for name, (value, copy) in self._before.items():
            if isinstance(value, CONTAINERS) and not unchanged(value, copy):
                return name
        return None


def watched(twin: nn.Module, names: set[str]) -> set[str]:
    """Let a twin note reads of some attributes that come before its own writes.

    Args:
        twin: The twin; its class is replaced by a subclass.
        names: The attributes.

    Returns:
        The names that were read, filled while the twin is used.
    """
    read: set[str] = set()
    written: set[str] = set()
    base: Any = type(twin)

    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
        if name in names and name not in written:
            read.add(name)
        return base.__getattribute__(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        written.add(name)
        base.__setattr__(self, name, value)

    namespace = {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__module__": base.__module__}
    twin.__class__ = type(base.__name__, (base,), namespace)
    return read
