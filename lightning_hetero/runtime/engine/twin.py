"""Twins of a module: one for each micro-batch, so that what user code writes to `self` does not reach the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import CONTAINERS, LARGE, content, is_same
from lightning_hetero.runtime.engine.meanwhile import writes_of
from lightning_hetero.runtime.standin import without_own_state
from lightning_hetero.runtime.transfer import version_of

# Kept by torch, and not among the attributes.
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})
_MISSING = object()


def twin_of(module: nn.Module, without: Mapping[str, Any], kind: type | None = None) -> nn.Module:
    """A new object of the module's class with the same parameters, buffers, submodules and attributes.

    Parameters and submodules that are replaced are replaced in both, buffers and attributes in the twin alone.

    Args:
        module: The module.
        without: Attributes that the twin is not to have, or is to have with another value.
        kind: Its class; that of the module if None.
    """
    twin: nn.Module = object.__new__(kind or type(module))
    twin.__dict__.update(module.__dict__)
    without_own_state(twin.__dict__)
    twin.__dict__["_buffers"] = dict(module._buffers)
    for name, value in without.items():
        twin.__dict__.pop(name, None)
        if value is not None:
            twin.__dict__[name] = value
    return twin


def shadow_of(module: nn.Module) -> nn.Module:
    """Another object with the very attributes of a module: what is set on one, the other has."""
    shadow: nn.Module = object.__new__(type(module))
    object.__setattr__(shadow, "__dict__", module.__dict__)
    return shadow


class Direct:
    """What is done with the attributes of a module itself, while micro-batches have twins.

    Attributes:
        read: Names that were read before they were written in this way.
        written: Names that were set or deleted.
    """

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()

    @contextmanager
    def noting(self, module: nn.Module) -> Iterator[None]:
        """Within the block, note it: the class of the module is replaced by a subclass."""
        base = type(module)
        _note(module, self.read, self.written)
        try:
            yield
        finally:
            object.__setattr__(module, "__class__", base)  # past what notes it


def _note(module: nn.Module, read: set[str], written: set[str]) -> None:
    """Note what is read of a module before it is written, and what is written: its class is replaced by a subclass."""
    base: Any = type(module)

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
    module.__class__ = type(base.__name__, (base,), namespace)


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
        self._buffers = dict(twin._buffers)
        self._attributes = dict(twin.__dict__)
        _note(twin, self.read, self.written)
        self._on_class = set(vars(type(twin)))

    @property
    def replaced_buffers(self) -> set[str]:
        """Names of buffers that are other tensors than they were, or are there no more."""
        before, now = self._buffers, self._twin._buffers
        return {key for key in {**before, **now} if now.get(key, _MISSING) is not before.get(key, _MISSING)}

    def look_past_setting(self) -> None:
        """Note what was set by `self.__dict__[name]` or `object.__setattr__`: it may have been read before, too."""
        before, now = self._attributes, self._twin.__dict__
        past = {name for name in {**before, **now} if now.get(name, _MISSING) is not before.get(name, _MISSING)}
        past -= self.written
        self.read |= past
        self.written |= past

    @property
    def set_on_class(self) -> list[str]:
        """Names that were set on the twin's class, which nobody else has."""
        return [name for name in vars(type(self._twin)) if name not in self._on_class]

    @property
    def replaced_for_all(self) -> set[str]:
        """Names of parameters and submodules that were set: all twins have the same ones."""
        return self.written & (self._twin._parameters.keys() | self._twin._modules.keys())

    def apply_to(self, module: nn.Module, ignored: Collection[str]) -> None:
        """Do to a module what was done to the twin."""
        for name in self.replaced_buffers:
            if name in self._twin._buffers:
                module._buffers[name] = self._twin._buffers[name]
            else:
                module._buffers.pop(name, None)
        for name in self.written:
            if name in ignored or name in self._buffers or name in self._twin._buffers:
                continue
            if name in self._twin.__dict__:
                module.__dict__[name] = self._twin.__dict__[name]
            else:
                module.__dict__.pop(name, None)


def handed_on(uses: Sequence[Uses]) -> str | None:
    """Name of what goes from one micro-batch to the next: one twin wrote it and another read it, or all have it."""
    written = set().union(*(use.written | use.replaced_buffers for use in uses))
    read = set().union(*(use.read for use in uses))
    return min((written & read).union(*(use.replaced_for_all for use in uses)), default=None)


class Contents:
    """What is in the lists and the like, tensors and buffers that a module has, and all its twins with it.

    Of parameters, those of modules below it too, it knows whether they were written to.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*(item for item in module.__dict__.items() if item[0] not in _REGISTRIES), *module._buffers.items()]
        self._before = [
            (name, value, _within(value)) for name, value in own if isinstance(value, (Tensor, *CONTAINERS))
        ]
        self._module = module
        self._parameters = [(parameter, writes_of(parameter)) for parameter in module.parameters()]

    def changed(self) -> str | None:
        """Name of one that is not as it was; None if all are."""
        found = next((name for name, value, before in self._before if not _is_as(value, before)), None)
        moved = {id(parameter) for parameter, before in self._parameters if writes_of(parameter) != before}
        if found is not None or not moved:
            return found
        return next(name for name, parameter in self._module.named_parameters() if id(parameter) in moved)


def _within(value: Any) -> Any:
    """What is in it, without a look at every item of a large one: this is done for each step."""
    if isinstance(value, Tensor):
        return version_of(value)
    return content(value, may_be_large=True) if len(value) <= LARGE else len(value)


def _is_as(value: Any, before: Any) -> bool:
    if isinstance(before, int):
        return before == (version_of(value) if isinstance(value, Tensor) else len(value))
    return is_same(value, before)
