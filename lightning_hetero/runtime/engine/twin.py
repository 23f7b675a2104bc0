"""Twins of a module: one for each micro-batch, so that what user code writes to `self` does not reach the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import CONTAINERS, LARGE, content, is_same
from lightning_hetero.runtime.transfer import version_of

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


class Uses:
    """What user code did with the attributes of a twin.

    Args:
        twin: The twin; its class is replaced by a subclass that notes reads and writes.

    Attributes:
        read: Names that were read before they were written.
        written: Names that were set or deleted.
    """

    def __init__(self, twin: nn.Module) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()
        self._twin = twin
        read, written = self.read, self.written
        base: Any = type(twin)

        def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
            if name not in written:
                read.add(name)
            return base.__getattribute__(self, name)

        def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
            written.add(name)
            base.__setattr__(self, name, value)

        def __delattr__(self: Any, name: str) -> None:  # noqa: N807
            written.add(name)
            base.__delattr__(self, name)

        namespace = {
            "__getattribute__": __getattribute__,
            "__setattr__": __setattr__,
            "__delattr__": __delattr__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        twin.__class__ = type(base.__name__, (base,), namespace)

    def apply_to(self, module: nn.Module, ignored: Collection[str]) -> None:
        """Do to a module what was done to the twin."""
        for name in self.written:
            if name in ignored:
                continue
            if name in self._twin.__dict__:
                module.__dict__[name] = self._twin.__dict__[name]
            else:
                module.__dict__.pop(name, None)


def handed_on(uses: Sequence[Uses]) -> str | None:
    """Name of an attribute that one twin wrote and another read: it goes from one micro-batch to the next."""
    written = set().union(*(use.written for use in uses))
    read = set().union(*(use.read for use in uses))
    return min(written & read, default=None)


class Contents:
    """What is in the lists and the like, tensors and buffers that a module has, and all its twins with it.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*(item for item in module.__dict__.items() if item[0] not in _SHARED), *module._buffers.items()]
        self._before = [
            (name, value, _within(value)) for name, value in own if isinstance(value, (Tensor, *CONTAINERS))
        ]

    def changed(self) -> str | None:
        """Name of one that is not as it was; None if all are."""
        return next((name for name, value, before in self._before if not _is_as(value, before)), None)


def _within(value: Any) -> Any:
    """What is in it, without a look at every item of a large one: this is done for each step."""
    if isinstance(value, Tensor):
        return version_of(value)
    return content(value, may_be_large=True) if len(value) <= LARGE else len(value)


def _is_as(value: Any, before: Any) -> bool:
    if isinstance(before, int):
        return before == (version_of(value) if isinstance(value, Tensor) else len(value))
    return is_same(value, before)
