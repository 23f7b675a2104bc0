"""Looks again and again, between the operations of a trial, whether anything is different: so it has to be quick."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from lightning_hetero.runtime.engine import contents
from lightning_hetero.runtime.engine.contents import LARGE, Thing


class QuickLook:
    """Tells whether all is as it was. It may be wrong about that in one way only: that something is different.

    Args:
        modules: Modules, of which modes and attributes are looked at.
        inside: What is inside of their attributes.
        parameters: Parameters, and whether they are trained.
    """

    def __init__(
        self, modules: Iterable[nn.Module], inside: Iterable[Thing], parameters: Iterable[tuple[Tensor, bool]]
    ) -> None:
        # Attributes: of the same size, with the same values in the same order.
        self._attributes: list[tuple[dict[str, Any], Sequence[Any]]] = [
            (vars(module), [*vars(module).values()]) for module in modules
        ]
        self._dicts: list[tuple[dict[Any, Any], Sequence[Any], Sequence[Any]]] = []
        self._lists: list[tuple[list[Any], Sequence[Any]]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._others: list[Thing] = []
        self._parameters = [*parameters]
        for thing in inside:
            self._sort(thing)

    def _sort(self, thing: Thing) -> None:
        value, kept = thing.value, thing.content
        if isinstance(value, Tensor):
            if not value.is_inference():  # which does not count its changes
                self._tensors.append((value, kept[0]))
        elif isinstance(value, dict) and len(value) <= LARGE:
            self._dicts.append((value, [*dict.keys(value)], [*dict.values(value)]))
        elif isinstance(value, list) and len(value) <= LARGE:
            self._lists.append((value, kept))
        elif isinstance(value, contents.CONTAINERS) or not contents.is_open(value):
            self._others.append(thing)
        elif len(vars_of := getattr(value, "__dict__", {})) == len(kept) and type(vars_of) is dict:
            self._attributes.append((vars_of, [*vars_of.values()]))
        else:
            self._others.append(thing)  # with slots

    def is_as_before(self) -> bool:
        """Whether nothing is different, surely."""
        for now, values in self._attributes:
            if len(now) != len(values) or not all(map(is_, now.values(), values)):
                return False
        for tensor, version in self._tensors:
            if tensor._version != version:
                return False
        for given, keys, values in self._dicts:
            if len(given) != len(keys) or not (
                all(map(is_, dict.values(given), values)) and all(map(is_, dict.keys(given), keys))
            ):
                return False
        for items, kept in self._lists:
            if len(items) != len(kept) or not all(map(is_, list.__iter__(items), kept)):
                return False
        for parameter, trained in self._parameters:
            if parameter.requires_grad != trained:
                return False
        return all(contents.is_same(each.value, each.content, quickly=True) for each in self._others)
