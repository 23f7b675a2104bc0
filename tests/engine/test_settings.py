"""What forward decides by, and the state that it keeps, out of sight. Results are those of one device."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.testing.rows import rows, squares

MakePair = Callable[..., Any]
ROUNDING = 1e-12
IS_CENTRED = False
OPTIONS: dict[str, Any] = {"centre": False}
COUNTS = itertools.count(1)


def set_for_both(both: Any, change: Callable[[Any], None]) -> None:
    for model in (both.model, both.alone):
        change(model)


class Scaled(nn.Module):
    """Scales by what `factor` gives. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.state = nn.Linear(8, 8), nn.Linear(8, 4), self.new_state()

    def __deepcopy__(self, memo: Any) -> Scaled:  # of the two copies, each has its own state, from the beginning
        other = type(self)().double()
        other.load_state_dict(self.state_dict())
        return other

    @staticmethod
    def new_state() -> Any:
        return None

    def factor(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) * self.factor()))  # type: ignore[no-any-return]


class Annealing:
    """Less at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 1.0 / self.calls


@dataclass(slots=True)
class Meter:
    """Counts; has no `__dict__`."""

    count: int = 0

    def next(self) -> int:
        self.count += 1
        return self.count


class Calls(Scaled):
    new_state = staticmethod(Annealing)

    def factor(self) -> float:
        return float(self.state())


class BoundMethod(Calls):
    @staticmethod
    def new_state() -> Any:
        return Annealing().__call__


class Slots(Scaled):
    new_state = staticmethod(Meter)

    def factor(self) -> float:
        return 1.0 / self.state.next()


class Cycles(Scaled):
    @staticmethod
    def new_state() -> Any:
        return itertools.cycle([1.0, 2.0, 3.0, 4.0])

    def factor(self) -> float:
        return float(next(self.state))


class Generates(Cycles):
    @staticmethod
    def new_state() -> Iterator[float]:
        return (1.0 / n for n in itertools.count(1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Calls, "changes the attribute 'state'"),
        (BoundMethod, "changes the attribute 'state'"),
        (Slots, "changes the attribute 'state'"),
        (Cycles, "the iterator in Cycles.state"),
        (Generates, "the iterator in Generates.state"),
    ],
)
def test_state_in_objects_that_are_no_modules_goes_on_once_a_call(
    kind: type[Scaled], reason: str, pair: MakePair
) -> None:
    both = pair(kind().double())
    for _ in range(3):
        both.step(squares)
        assert both.difference <= ROUNDING
    assert reason in both.engine.reasons[0]


class Counts(nn.Module):
    """Scales by an iterator outside of it. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) / next(COUNTS)))  # type: ignore[no-any-return]


def test_an_iterator_in_a_global_goes_on_once_a_call(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "COUNTS", itertools.count(1))
    both = pair(Counts().double())
    both.model(rows())
    assert "the iterator in the global 'COUNTS'" in both.engine.reasons[0]
    assert next(COUNTS) == 2


class Unread(Scaled):
    """Has an iterator that only its training step uses, and may be cut."""

    new_state = staticmethod(Cycles.new_state)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def test_an_iterator_that_forward_does_not_name_is_no_reason(pair: MakePair) -> None:
    both = pair(Unread().double())
    both.step(squares)
    assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 1


class Gated(nn.Module):
    """Mixes rows by a gate that is zero at first. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gate = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h + self.gate * h.mean(0)))  # type: ignore[no-any-return]


def test_a_gate_that_is_trained_later(pair: MakePair) -> None:
    both = pair(Gated().double())
    for step in range(4):
        if step == 2:
            set_for_both(both, lambda model: model.gate.requires_grad_(True))
        both.step(squares)
        assert both.difference <= ROUNDING
        with torch.no_grad():
            for p, q in zip(both.model.parameters(), both.alone.parameters(), strict=True):
                if q.grad is not None:
                    p -= 0.5 * p.grad
                    q -= 0.5 * q.grad


def unchanged(h: Tensor) -> Tensor:
    return h


def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


def by_switch(is_centred: bool, h: Tensor) -> Tensor:
    return centred(h) if is_centred else h


def closing_over(is_centred: bool) -> Callable[[Tensor], Tensor]:
    return lambda h: centred(h) if is_centred else h


class Chosen:
    """Settings as attributes of a class that has no objects."""

    centre = False


class Decides(nn.Module):
    """Couples rows if one of many settings says so. Shape (rows, 8) to (rows, 4)."""

    is_shared_centred = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.options: dict[str, Any] = {"centre": False, "deeper": {"centre": False}}
        self.steps = {"plain": True}
        self.config = SimpleNamespace(inner=SimpleNamespace(centre=False), plain={"centre": False})
        self.flags: list[Any] = [False]
        self.modes = {"plain"}
        self.last: deque[Any] = deque([SimpleNamespace(centre=False)])
        self.function: Callable[[Tensor], Tensor] = unchanged

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.a(x))
        is_centred = self.options["centre"] or self.options["deeper"]["centre"]
        is_centred = is_centred or self.steps.get("centre") or self.config.inner.centre or self.config.plain["centre"]
        is_centred = is_centred or self.flags[-1] or "centre" in self.modes or self.last[0].centre
        is_centred = is_centred or self.is_shared_centred or IS_CENTRED or OPTIONS["centre"] or Chosen.centre
        return self.b(torch.tanh(centred(h) if is_centred else h))  # type: ignore[no-any-return]


class Inherits(Decides):
    """Has no such setting in its own class, until somebody sets one."""


SETTINGS: dict[str, Callable[[Any], None]] = {
    "a mapping": lambda model: model.options.update(centre=True),
    "a mapping in a mapping": lambda model: model.options["deeper"].update(centre=True),
    "another key of a mapping": lambda model: setattr(model, "steps", {"centre": True}),
    "an object in an object": lambda model: setattr(model.config.inner, "centre", True),
    "a mapping in an object": lambda model: model.config.plain.update(centre=True),
    "a list": lambda model: model.flags.append(True),
    "a set": lambda model: model.modes.add("centre"),
    "an object in a deque": lambda model: setattr(model.last[0], "centre", True),
    "a function": lambda model: setattr(model, "function", centred),
    "a function with a variable": lambda model: setattr(model, "function", closing_over(True)),
    "a function with an argument": lambda model: setattr(model, "function", functools.partial(by_switch, True)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_inside_of_an_attribute(setting: str, pair: MakePair) -> None:
    model = Decides().double()
    if setting == "a function with a variable":
        model.function = closing_over(False)
    if setting == "a function with an argument":
        model.function = functools.partial(by_switch, False)
    both = pair(model)
    for step in range(3):
        if step == 1:
            set_for_both(both, SETTINGS[setting])
        both.step(squares)
        assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (globals(), "IS_CENTRED"),
        (OPTIONS, "centre"),
        (Chosen, "centre"),
        (Decides, "is_shared_centred"),
        (Inherits, "is_shared_centred"),
    ],
)
def test_a_setting_outside_of_modules(owner: Any, name: str, pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair(Inherits().double())
    both.step(squares)
    put = monkeypatch.setitem if isinstance(owner, dict) else functools.partial(monkeypatch.setattr, raising=False)
    put(owner, name, True)  # type: ignore[operator]
    both.step(squares)
    assert both.difference <= ROUNDING
    monkeypatch.undo()
    both.step(squares)
    assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 2


class Later(nn.Module):
    """Couples rows from some count on. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.count, self.rate, self.unread = nn.Linear(8, 8), nn.Linear(8, 4), 0, 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.scaled(self.a(x))
        return self.b(torch.tanh(centred(h) if self.count >= 12 else h))  # type: ignore[no-any-return]

    def scaled(self, h: Tensor) -> Tensor:
        return h * self.rate


def test_a_counter_of_the_users_own(pair: MakePair) -> None:
    both = pair(Later().double())
    for step in range(15):
        set_for_both(both, lambda model, step=step: setattr(model, "count", step))
        both.step(squares)
        assert both.difference <= ROUNDING
    assert "its forward reads 'count', which keeps changing" in both.engine.reasons[0]


@pytest.mark.parametrize(("name", "unit"), [("rate", 0.1), ("unread", 1)])
def test_a_rate_and_what_forward_does_not_read_may_keep_changing(name: str, unit: float, pair: MakePair) -> None:
    both = pair(Later().double())
    for step in range(12):
        set_for_both(both, lambda model, step=step: setattr(model, name, (1 + step) * unit))
        both.step(squares)
        assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 12


class Hides(nn.Module):
    """Has a normalisation that is not registered. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hidden = nn.Linear(8, 8), nn.Linear(8, 4), [nn.BatchNorm1d(8).double().eval()]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.hidden[0](self.a(x))))  # type: ignore[no-any-return]


def test_a_hidden_module_that_changes_its_mode(pair: MakePair) -> None:
    both = pair(Hides().double(), on="cpu@speed=1,cpu@speed=1")
    for is_training in (False, True, False):
        set_for_both(both, lambda model, is_training=is_training: model.hidden[0].train(is_training))
        both.step(squares)
        assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 2


def test_a_buffer_of_a_hidden_module_that_is_changed_before_the_backward_of_rematerialization(pair: MakePair) -> None:
    both = pair(Hides().double(), on="cpu@speed=1,cpu@speed=1", rematerialize=True)
    y = both.model(rows())
    both.model.hidden[0].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


class Two(nn.Module):
    """Couples rows if those of its source are long. Shapes (rows, length, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = self.a(source)
        y: Tensor = self.b(torch.tanh(centred(h) if source.shape[1] > 10 else h)).mean(1)
        return y + self.b(self.a(target)).mean(1)


def test_a_rule_for_longer_rows_of_one_input(pair: MakePair) -> None:
    both = pair(Two().double())
    for source, target in ((5, 40), (20, 10)):
        both.step(lambda model, s=source, t=target: model(rows(16, s, 8), rows(16, t, 8)).pow(2).mean())
        assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 1


class Pools(nn.Module):
    """The mean of each row as far as its length goes. Shape (rows, length, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.lengths: list[int] = []

    def forward(self, x: Tensor, lengths: Any = None, size: Any = None) -> Tensor:
        found = lengths["lengths"] if isinstance(lengths, dict) else lengths or self.lengths
        return self.b(torch.stack([row[:n].mean(0) for row, n in zip(self.a(x), found)]))  # type: ignore[no-any-return]  # noqa: B905


MIXED = list(range(2, 18))


@pytest.mark.parametrize("way", [list, tuple, lambda lengths: {"lengths": lengths}])
def test_an_argument_that_has_an_item_for_each_row(way: Callable[[list[int]], Any], pair: MakePair) -> None:
    both = pair(Pools().double())
    for lengths in ([5] * 16, MIXED):
        both.step(lambda model, lengths=lengths: model(rows(16, 20, 8), way(lengths)).pow(2).mean())
        assert both.difference <= ROUNDING
    assert "a list that has an item for each row" in both.engine.reasons[0]


def test_an_attribute_that_has_an_item_for_each_row(pair: MakePair) -> None:
    both = pair(Pools().double())
    for lengths in ([5] * 16, MIXED):
        set_for_both(both, lambda model, lengths=lengths: setattr(model, "lengths", lengths))
        both.step(lambda model: model(rows(16, 20, 8)).pow(2).mean())
        assert both.difference <= ROUNDING
