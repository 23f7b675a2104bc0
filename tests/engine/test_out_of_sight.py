"""What a trial sees only if it looks for it: state that hides, and rules that begin later. Results are those of one."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_hetero.testing.rows import rows, squares

MakePair = Callable[..., Any]
ROUNDING = 1e-12
COLLECTED: list[Tensor] = []
LOCAL = threading.local()
DICE = random.Random(0)


def test_parametrizations_that_are_cached_around_a_call_get_their_gradients(pair: MakePair) -> None:
    layers = (parametrizations.weight_norm(nn.Linear(8, size).double()) for size in (8, 8, 4))
    both = pair(nn.Sequential(*layers))

    def loss(model: nn.Module) -> Tensor:
        with parametrize.cached():
            return squares(model)

    for _ in range(2):
        both.step(loss)
        assert both.difference <= ROUNDING
    assert "parametrizations are cached around it" in both.engine.reasons[0]
    both.step(squares)
    assert both.engine.cut_calls == 1


def collect(value: Tensor) -> None:
    COLLECTED.append(value)


def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that keeps what it needs for itself."""
    found: list[Tensor] = COLLECTED

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        found.append(self.rho.pow(2).sum())
        return forward(self, x)

    return wrapper


def collector() -> tuple[list[Tensor], Callable[[Tensor], None]]:
    found: list[Tensor] = []
    return found, lambda value: found.append(value)


class Bayesian(nn.Module):
    """Hands its complexity to somebody else. Shape (rows, 8)."""

    def __init__(self, add: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.linear, self.rho, self.add = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.3)), add

    def forward(self, x: Tensor) -> Tensor:
        value = self.rho.pow(2).sum()
        if self.add is None:
            collect(value)
        else:
            self.add(value)
        return self.linear(x) * self.rho  # type: ignore[no-any-return]


class Decorated(Bayesian):
    """Its decorator hands the complexity on."""

    @counted
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.rho  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["a function", "a closure", "the second of two", "a decorator"])
def test_lists_that_are_reached_by_a_function_are_added_to_once(way: str, pair: MakePair) -> None:
    found, add = (COLLECTED, None) if way in ("a function", "a decorator") else collector()
    layer = Decorated() if way == "a decorator" else Bayesian(add)
    first = [Bayesian(collector()[1])] if way == "the second of two" else []
    both = pair(nn.Sequential(*first, layer, nn.Tanh(), nn.Linear(8, 4)).double())

    def loss(model: nn.Module) -> Tensor:
        found.clear()
        return squares(model) + 0.1 * sum(part.cpu() for part in found)

    for _ in range(2):
        both.step(loss)
        assert both.difference <= ROUNDING
    found.clear()


class Scaled(nn.Module):
    """Scales by what its thread says. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) * getattr(LOCAL, "factor", 1.0)))  # type: ignore[no-any-return]


def test_values_of_a_thread_are_those_of_the_thread_that_calls(pair: MakePair) -> None:
    both = pair(Scaled().double())
    LOCAL.factor = 2.0
    try:
        both.step(squares)
    finally:
        del LOCAL.factor
    assert both.difference <= ROUNDING
    assert "LOCAL" in both.engine.reasons[0]


class Noisy(nn.Module):
    """Adds noise from a generator. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        return self.b(torch.tanh(self.a(x + noise.to(x.device))))  # type: ignore[no-any-return]


def test_a_generator_that_is_passed_is_drawn_from_once(pair: MakePair) -> None:
    both = pair(Noisy().double())
    generators = {model: torch.Generator().manual_seed(5) for model in (both.model, both.alone)}
    for _ in range(2):
        both.step(lambda model: model(rows(), generators[model]).pow(2).mean())
        assert both.difference <= ROUNDING


class LayerDrop(nn.Module):
    """Leaves a layer out now and then. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if DICE.random() > 0.5:
            h = torch.tanh(self.b(h))
        return self.c(h)  # type: ignore[no-any-return]


def test_a_generator_of_python_in_a_global_is_drawn_from_once(pair: MakePair) -> None:
    both = pair(LayerDrop().double())

    def seeded(step: int) -> Callable[[nn.Module], Tensor]:
        def loss(model: nn.Module) -> Tensor:
            DICE.seed(step)
            return squares(model)

        return loss

    for step in range(8):
        both.step(seeded(step))
        assert both.difference <= ROUNDING


class Head(nn.Module):
    """Twice as much in training. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(1e-3)  # so that micro-batches meet
        y: Tensor = self.linear(x) * self.temperature
        return 2 * y if self.training else y


class Switches(nn.Module):
    """Targets in evaluation mode, predictions in training mode. Shape (rows, 8) to twice (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), Head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        self.head.eval()
        with torch.no_grad():
            target = self.head(h)
        self.head.train()
        return self.head(h), target


class Freezes(Switches):
    """Trains the body alone by one head, and the head by features that are cut off."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        for parameter in self.head.parameters():
            parameter.requires_grad = False
        value = self.head(h)
        for parameter in self.head.parameters():
            parameter.requires_grad = True
        return value, self.head(h.detach())


@pytest.mark.parametrize("kind", [Switches, Freezes])
def test_flags_that_a_forward_switches_for_a_while(kind: type[nn.Module], pair: MakePair) -> None:
    both = pair(kind().double())
    for _ in range(2):
        both.step(lambda model: sum((y - 1).pow(2).mean() for y in model(rows())))
        assert both.difference <= ROUNDING
    assert "for a while" in both.engine.reasons[0]


class Table(nn.Module):
    """Keeps a table for the last height and width, as window attention does. Shape (rows, height, width, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.size: tuple[int, ...] = ()
        self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:3])
        if self.size != size:
            self.size = size
            time.sleep(5e-3)  # it takes some time to make
            height, width = size
            table = torch.arange(height)[:, None] * 10.0 + torch.arange(width)
            self.table = table.flatten().double().cos()[:, None].to(x.device)
        return self.b(torch.tanh(self.a(x).flatten(1, 2) * self.table)).mean(1)  # type: ignore[no-any-return]


def test_a_table_that_is_made_anew_in_the_middle_of_a_run(pair: MakePair) -> None:
    both = pair(Table().double())
    for shape in [(4, 6, 8)] * 3 + [(6, 4, 8), (4, 6, 8), (2, 12, 8), (2, 12, 8)]:
        both.step(lambda model, shape=shape: model(rows(16, *shape)).pow(2).mean())
        assert both.difference <= ROUNDING
    assert both.engine.cut_calls


@pytest.mark.parametrize("middle", ["nothing", "dropout", "batch normalisation"])
def test_rematerialization_finds_modules_as_they_were(middle: str, pair: MakePair) -> None:
    layers = {"nothing": nn.Identity(), "dropout": nn.Dropout(0.5), "batch normalisation": nn.BatchNorm1d(8)}
    both = pair(nn.Sequential(nn.Linear(8, 8), layers[middle], nn.Tanh(), Head()).double(), rematerialize=True)

    def loss(model: Any) -> Tensor:
        model.eval()
        model[3].temperature = 3.0
        y: Tensor = model(rows())
        model[3].temperature = 1.0
        model.train()
        return y.pow(2).mean()

    for _ in range(2):
        both.step(loss)
        assert both.difference <= ROUNDING
        assert both.model.training
        assert both.model[3].temperature == 1.0
        for mine, alone in zip(both.model.buffers(), both.alone.buffers(), strict=True):
            assert torch.equal(mine.cpu(), alone)
    assert both.engine.cut_calls == 2


def test_rematerialization_refuses_a_buffer_that_is_another_one_by_then(pair: MakePair) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
    both = pair(model, rematerialize=True)
    y = both.model(rows())
    both.model[2].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="buffer of Sequential was changed in place after the call"):
        y.sum().backward()


class Trims(nn.Module):
    """Sees padding, as far as the longest row goes. Shape (rows, length, 8) to (rows, 4)."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(8, 8), nn.Linear(8, 4), way

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        most = lengths.max()
        if self.way == "slice":
            x = x[:, :most]
        elif self.way == "narrow":
            x = x.narrow(1, 0, most)
        else:
            x = x[:, torch.arange(most, device=x.device)]
        return self.b(torch.tanh(self.a(x)).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["slice", "arange", "narrow"])
def test_a_tensor_as_a_number_of_places(way: str, pair: MakePair) -> None:
    both = pair(Trims(way).double())
    for lengths in (torch.full((16,), 6), torch.tensor([6] * 4 + [2] * 12)):
        both.step(lambda model, lengths=lengths: model(rows(16, 6, 8), lengths).pow(2).mean())
        assert both.difference <= ROUNDING


class Experts(nn.Module):
    """An expert takes 64 tokens of a batch at most, in order; others pass by. Shape (rows, length, 8) to (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.router, self.one, self.two = (nn.Linear(8, size) for size in (8, 2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.a(x).flatten(0, 1)
        weight, choice = self.router(flat).softmax(-1).max(-1)
        place = F.one_hot(choice, 2)
        kept = ((place.cumsum(0) * place).sum(-1) <= 64)[:, None]
        y = torch.where(choice[:, None] == 0, self.one(flat), self.two(flat)) * weight[:, None]
        return torch.where(kept, y, flat).view(*x.shape[:2], -1).mean(1)


def test_a_rule_for_longer_rows_than_those_of_the_first_batch(pair: MakePair) -> None:
    both = pair(Experts().double())
    for length in (4, 16, 4):
        both.step(lambda model, length=length: model(rows(16, length, 8)).pow(2).mean())
        assert both.difference <= ROUNDING


class Configured(nn.Module):
    """Couples rows if its configuration says so. Shape (rows, 8) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.config = nn.Linear(8, 8), nn.Linear(8, 4), SimpleNamespace(centre=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h - h.mean(0) if self.config.centre else h))  # type: ignore[no-any-return]


def test_a_setting_in_an_object_that_modules_share(pair: MakePair) -> None:
    both = pair(Configured().double())
    for centre in (False, True, False):
        both.model.config.centre = both.alone.config.centre = centre
        both.step(squares)
        assert both.difference <= ROUNDING
    assert both.engine.cut_calls == 2
