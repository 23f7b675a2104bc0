"""What a verdict on a region depends on, and may be different at the next call."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.settings import FLAGS, Settings
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.watch import HOOKS

_HOOKS = attrgetter(*HOOKS)
_MOST_VALUES = 8  # of one flag; with more it is taken for a number that keeps changing
_MOST_AROUND = 2  # the same for values around the module: a step counts on for sure
_PAUSE = 64  # calls before the second new trial for one that keeps changing; twice as many before the third, and so on
_MOST_KEYS = 1024  # that are remembered


class Keys:
    """Makes keys for the calls of one region.

    A module may do something else if an attribute or an argument says so (a mode, a switch, the epoch), or for
    arguments by other names. So a key has the structure of the inputs and the values of all flags, numbers and texts,
    those in objects such as `self.config`, in globals and in the classes of the modules too, and there is a trial for
    each. Where one of them keeps changing (a counter of steps) that would be a trial at every call. If the code reads
    it, the region runs whole at each further value; else, and if it is an argument or the rate of a schedule, it gets
    a trial now and then.

    Attributes:
        hidden: Modules that were found in attributes at the last call, beside those of the region.
        used: All modules that its code may look at: metrics that it does not name are none of them.
        changing: Name of a value that keeps changing, that the code reads, and that is another one at the last call
            than at all that were tried; None if there is none.
    """

    def __init__(self) -> None:
        self.hidden: Sequence[nn.Module] = ()
        self.used: Sequence[nn.Module] = ()
        self.changing: str | None = None
        self._calls = 0
        self._settings = Settings()
        self._values: dict[Hashable, set[Any]] = {}
        self._changing: dict[Hashable, _Changing] = {}
        self._last: tuple[Any, ...] = ()
        self._last_key = -1
        self._keys: dict[Hashable, int] = {}  # short ones: to hash a long one takes longer than to compare it
        self._numbers = itertools.count()

    def of(
        self,
        parts: Sequence[nn.Module],
        given: Tree,
        trainable: Sequence[Tensor],
        around: Sequence[Hashable] = (),
        *,
        always: bool = False,
    ) -> Hashable:
        """The key of a call.

        Args:
            parts: The modules of the region.
            given: Its inputs.
            trainable: Its parameters that gradients are computed for.
            around: Other values that user code may decide by.
            always: Whether the first of these makes another key with each new value.
        """
        self._calls += 1
        found = self._settings.look(parts, given.values)
        modules = found.modules
        self.hidden, self.used = found.hidden, modules
        trained = [id(each) for part in self.hidden for each in part._parameters.values() if _is_trained(each)]
        now = (
            [(id(part), *map(len, _HOOKS(part))) for part in modules],
            found.values,
            [value if isinstance(value, FLAGS) else type(value) for value in given.values],
            given.form,
            [*map(id, trainable), *trained],
            [*_layout(given.tensors)],
            torch.is_grad_enabled(),
        )
        if self._changing or now != self._last:
            self.changing = None
            self._last, self._last_key = now, self._number(now, found.paths)
        moment = [self._flag(("around", index), value, _MOST_AROUND) for index, value in enumerate(around)]
        return self._last_key, tuple(moment), tuple(around[:1]) if always else ()

    def _number(self, now: tuple[Any, ...], paths: Sequence[Hashable]) -> int:
        hooks, settings, given, form, trained, layout, with_gradients = now
        flags = [self._setting(path, value) for path, value in zip(paths, settings, strict=True)]
        flags += [
            self._flag(("given", index), value) if isinstance(value, FLAGS) else value
            for index, value in enumerate(given)
        ]
        key = tuple(hooks), tuple(flags), tuple(form), tuple(trained), tuple(layout), with_gradients
        if key not in self._keys and len(self._keys) >= _MOST_KEYS:
            self._keys.clear()
        return self._keys.setdefault(key, next(self._numbers))

    def _setting(self, path: Hashable, value: Any) -> Any:
        known = self._flag(path, value)
        if known is not value and known != value:
            self.changing = self._settings.name_read(path, value) or self.changing
        return known

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


class _Changing(NamedTuple):
    """A flag that keeps changing: its value at its last trial, when that was, and how many there were."""

    value: Any
    since: int
    trials: int = 1


def _is_trained(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _layout(tensors: Sequence[Tensor]) -> Iterator[Hashable]:
    """Dtypes and dimensions of tensors, and which of them have as many rows as others: these may be the batch."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        rows = tensor.shape[0] if tensor.dim() else -1
        group = min(rows, 1) if rows < 2 else 2 + seen.setdefault(rows, len(seen))
        yield tensor.dtype, tensor.dim(), tensor.requires_grad, group
