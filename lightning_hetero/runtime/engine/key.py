"""What a verdict on a region depends on, and may be different at the next call."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import is_open
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.watch import HOOKS

_FLAGS = (bool, int, float, str, Enum, type(None))
_MOST_VALUES = 8  # of one flag; with more it is taken for a number that keeps changing
_MOST_AROUND = 2  # the same for values around the module: a step counts on for sure
_PAUSE = 64  # calls before the second new trial for one that keeps changing; twice as many before the third, and so on
_EVERY_MODULE_HAS = frozenset(vars(nn.Module())) - {"training"}


class Keys:
    """Makes keys for the calls of one region.

    A module may do something else if an attribute or an argument says so (a mode, a switch, the epoch). So a key has
    the values of all flags, numbers and texts, those in objects such as `self.config` too, and there is a trial for
    each. Where one of them keeps changing (a counter of steps, the rate of a schedule) that would be a trial at every
    call; such a one gets a trial now and then.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._values: dict[Hashable, set[Any]] = {}
        self._changing: dict[Hashable, _Changing] = {}

    def of(
        self, parts: Sequence[nn.Module], given: Tree, around: Sequence[Hashable] = (), *, always: bool = False
    ) -> Hashable:
        """The key of a call.

        Args:
            parts: The modules of the region.
            given: Its inputs.
            around: Other values that user code may decide by.
            always: Whether the first of these makes another key with each new value.
        """
        self._calls += 1
        hooks = tuple([(id(part), *[len(getattr(part, kind)) for kind in HOOKS]) for part in parts])
        flags = [
            self._flag((index, name), value)
            for index, part in enumerate(parts)
            for name, value in part.__dict__.items()
            if name not in _EVERY_MODULE_HAS and isinstance(value, _FLAGS)
        ]
        flags += [self._flag((id(members), name), value) for members, name, value in _settings(parts)]
        flags += [
            self._flag(index, value) if isinstance(value, _FLAGS) else type(value)
            for index, value in enumerate(given.values)
        ]
        flags += [self._flag(("around", index), value, _MOST_AROUND) for index, value in enumerate(around)]
        flags += around[:1] if always else ()
        return hooks, tuple(flags), tuple(_layout(given.tensors)), torch.is_grad_enabled()

    def _flag(self, name: Hashable, value: Any, most: int = _MOST_VALUES) -> Any:
        values = self._values.get(name)
        if values is None:
            values = self._values[name] = set()
        if value in values:
            return value
        if len(values) < most:
            values.add(value)
            return value
        known = self._changing.setdefault(name, _Changing(value, self._calls))
        if known.value != value and self._calls - known.since >= _PAUSE * known.trials:
            self._changing[name] = known = _Changing(value, self._calls, known.trials + 1)
        return known.value


def _settings(parts: Sequence[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    """Flags in objects that modules have, such as the configuration that all parts of a model share."""
    seen: set[int] = set()
    for part in parts:
        for name, value in part.__dict__.items():
            if isinstance(value, _FLAGS) or name in _EVERY_MODULE_HAS or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                members = value if type(value) is not dict else {}  # Lightning's `hparams`; others may be caches
            else:
                members = vars(value) if is_open(value) else {}
            for key, member in list(members.items()):
                if isinstance(key, str) and isinstance(member, _FLAGS):
                    yield value, key, member


class _Changing(NamedTuple):
    """A flag that keeps changing: its value at its last trial, when that was, and how many there were."""

    value: Any
    since: int
    trials: int = 1


def _layout(tensors: Sequence[Tensor]) -> Iterator[Hashable]:
    """Dtypes and dimensions of tensors, and which of them have as many rows as others: these may be the batch."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        rows = tensor.shape[0] if tensor.dim() else -1
        group = min(rows, 1) if rows < 2 else 2 + seen.setdefault(rows, len(seen))
        yield tensor.dtype, tensor.dim(), tensor.requires_grad, group
