"""A quick look at a module finds whatever the thorough one finds, and nothing where nothing is different."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime.engine.snapshot import Snapshot


class Setting:
    def __init__(self) -> None:
        self.rate = 0.5


class Slots:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 0.5


class Model(nn.Module):
    """Has something of each kind that can change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.number, self.setting, self.slots = 1, Setting(), Slots()
        self.table: dict[str, Any] = {"a": 1, "b": [1, 2]}
        self.recent: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        self.items, self.queue, self.names = [1, 2], deque([1, 2]), {"a"}
        self.long = [*range(100)]
        self.plain = torch.zeros(2)
        self.register_buffer("buffer", torch.zeros(2))


CHANGES: dict[str, Callable[[Model], object]] = {
    "an attribute": lambda m: setattr(m, "number", 2),
    "a new attribute": lambda m: setattr(m, "new", 2),
    "an attribute less": lambda m: delattr(m, "number"),
    "an attribute of a part": lambda m: setattr(m.inner, "in_features", 3),
    "the mode": lambda m: m.eval(),
    "the mode of a part": lambda m: m.inner.eval(),
    "a setting in an object": lambda m: setattr(m.setting, "rate", 0.1),
    "a new setting in an object": lambda m: setattr(m.setting, "new", 0.1),
    "a setting in a slot": lambda m: setattr(m.slots, "rate", 0.1),
    "an entry": lambda m: m.table.update(a=2),
    "a new entry": lambda m: m.table.update(c=2),
    "another key for an entry": lambda m: m.table.update(c=m.table.pop("a")),
    "an entry of an ordered mapping": lambda m: m.recent.update(a=3),
    "an item": lambda m: m.items.__setitem__(0, 3),
    "the order of items": lambda m: m.items.reverse(),
    "a new item": lambda m: m.items.append(3),
    "an item within an entry": lambda m: m.table["b"].append(3),
    "an item of a queue": lambda m: m.queue.rotate(),
    "a new name in a set": lambda m: m.names.add("b"),
    "the length of a long list": lambda m: m.long.append(3),
    "a tensor": lambda m: m.plain.add_(1.0),
    "requires_grad": lambda m: m.inner.weight.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_found_in_the_words_of_the_thorough_look(change: Callable[[Model], object]) -> None:
    model = Model()
    snapshot = Snapshot(model)
    look = snapshot.look()
    assert look() is None
    with torch.no_grad():
        change(model)
    assert look() == snapshot.change_so_far() is not None
    with torch.no_grad():
        snapshot.put_back()
    if change is not CHANGES["a tensor"]:  # which counts that it was written to, also back
        assert look() is None


def test_what_is_the_same_for_the_thorough_look_is_no_change() -> None:
    model = Model()
    snapshot = Snapshot(model)
    look = snapshot.look()
    model.recent.move_to_end("a")
    model.table["a"] = model.table.pop("a")  # now the last
    model.__dict__["number"] = model.__dict__.pop("number")
    assert look() is None
    assert snapshot.change_so_far() is None


def test_modules_that_are_not_asked_for_may_change() -> None:
    model = Model()
    look = Snapshot(model).look({id(model)})
    model.inner.eval()
    assert look() is None
    model.number = 2
    assert look() == "changes the attribute 'number' of Model"


def test_nobody_who_watches_operations_sees_the_look() -> None:
    seen: list[Any] = []

    class Watches(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = Model()
    look = Snapshot(model).look()
    with Watches():
        assert look() is None
        model.number = 2
        assert look() is not None
    assert seen == []
