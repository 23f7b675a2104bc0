"""Gradients of large weights are added to their sums as they come: the same bits, hooks of user code as ever."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine import at_once
from lightning_hetero.runtime.engine.at_once import AddsAtOnce
from lightning_hetero.runtime.engine.leaves import Sum
from lightning_hetero.runtime.engine.silence import Silence

MakePair = Callable[..., Any]
WHERE = {"0": "emulated:0", "1": "emulated:1", "2": "emulated:2"}
LANES = 4


@pytest.fixture
def devices() -> str:
    """Those whose weights are on the CPU."""
    return "cpu@speed=1,cpu@speed=1,cpu@speed=1"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`large(elements)` says which weights are large."""
    return lambda elements: monkeypatch.setattr(at_once, "LARGE", elements)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the gradients that were added at once."""
    sizes: list[int] = []
    really = AddsAtOnce.__call__

    def call(self: AddsAtOnce, gradient: Tensor | None) -> Tensor | None:
        result = really(self, gradient)
        if self.is_done and gradient is not None:
            sizes.append(gradient.numel())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(AddsAtOnce, "__call__", call)
        yield sizes


class Product(torch.autograd.Function):
    """A product whose backward differentiates by the weight in its own way, as layers with a solver in them do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            by_x, by_weight = torch.autograd.grad(x @ weight / 2, (x, weight), gradients)
        return 2 * by_x, 2 * by_weight


class Solver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


class Sum2(nn.Module):
    """Two leaves, to which autograd hands one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 8))
        self.b = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a + self.b)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.words((x[:, :3] * 10).long().abs() % 9).sum(1) + x


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)),
    "a weight of two parts": tied,
    "a weight used twice": lambda: nn.Sequential(Twice(8, 8), Twice(8, 8), nn.Linear(8, 8)),
    "one gradient for two weights": lambda: nn.Sequential(Sum2(), nn.Linear(8, 8), Sum2()),
    "a backward that differentiates by the weight": lambda: nn.Sequential(nn.Linear(8, 8), Solver(), Solver()),
    "sparse gradients": lambda: nn.Sequential(Words(), nn.Linear(8, 8), Words()),
    "half frozen": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bit_for_bit(
    pair: MakePair, large: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def found(elements: float) -> tuple[list[Tensor | None], list[int]]:
        large(elements)
        torch.manual_seed(0)
        both = pair(MODELS[name](), {**WHERE, "2": "emulated:0"}, micro_batches=LANES)
        both.model.double(), both.alone.double()
        batch = torch.randn(10, 8, dtype=torch.float64)
        both.step(lambda model: model(batch).pow(2).mean())
        with counted(monkeypatch) as sizes:
            both.step(lambda model: model(batch).pow(2).mean())
            both.step(lambda model: model(batch).pow(2).mean() + model(2 * batch).sum())  # two calls, one backward
        assert both.calls == 4
        assert all(not p._backward_hooks for p in both.model.parameters())
        for p, q in zip(both.model.parameters(), both.alone.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad.to_dense(), q.grad.to_dense(), rtol=1e-12, atol=1e-12)
        grads = [None if p.grad is None else p.grad.to_dense() for p in both.model.parameters()]
        both.close()
        return grads, sizes

    (by_once, once), (by_end, end) = found(1), found(float("inf"))
    assert once
    assert not end
    for a, b in zip(by_once, by_end, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_large_weights_only(pair: MakePair, large: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    large(64)
    both = pair(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)), WHERE, micro_batches=LANES)
    batch = torch.randn(8, 8)
    both.step(lambda model: model(batch).pow(2).mean())
    with counted(monkeypatch) as sizes:
        both.step(lambda model: model(batch).pow(2).mean())
    assert sizes == [64] * 2 * LANES  # no biases, and not the last one


def test_gradients_are_gone_when_the_next_one_comes(
    pair: MakePair, large: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit has three weights; only the sums of the first micro-batch's stay."""
    large(64)
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    both = pair(nn.Sequential(layers, nn.Linear(8, 2)), {"0": "emulated:0", "1": "emulated:1"}, micro_batches=LANES)
    batch = torch.randn(8, 8)
    both.step(lambda model: model(batch).pow(2).mean())
    came: list[weakref.ref[Tensor]] = []
    most = [0]
    really = Sum.add

    def add(self: Sum, leaves: Any, found: Any) -> None:
        most[0] = max(most[0], sum(each() is not None for each in came))
        really(self, leaves, found)
        came.extend(weakref.ref(gradient) for gradient in found if gradient is not None and gradient.numel() == 64)

    monkeypatch.setattr(Sum, "add", add)
    both.step(lambda model: model(batch).pow(2).mean())
    assert len(came) == 3 * LANES
    assert most[0] == 3


def test_hooks_of_user_code_see_the_whole_gradient_once(pair: MakePair, large: Callable[[float], None]) -> None:
    large(1)
    both = pair(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), WHERE, micro_batches=LANES)
    seen: list[Tensor] = []

    def double(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return 2 * gradient

    batch = torch.randn(8, 8)
    both.step(lambda model: model(batch).pow(2).mean())
    both.model[1].weight.register_hook(double)
    both.model.zero_grad()
    both.model(batch).pow(2).mean().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], both.alone[1].weight.grad)
    assert torch.equal(both.model[1].weight.grad, 2 * seen[0])


def test_it_goes_on_where_another_call_silences_hooks() -> None:
    """Two calls with a weight in common may be in their backward at the same time."""
    weight, silence = nn.Parameter(torch.randn(3)), Silence()
    ours = weight.register_hook(AddsAtOnce(Sum(), weight, []))
    theirs = weight.register_hook(lambda gradient: None)
    silence.begin([weight])
    assert [type(hook) for hook in weight._backward_hooks.values()] == [AddsAtOnce]
    ours.remove()
    silence.end([weight])
    assert [*weight._backward_hooks] == [theirs.id]


def test_hooks_that_come_between_two_calls_are_put_back_with_those_that_were_there() -> None:
    weight, silence = nn.Parameter(torch.randn(3)), Silence()
    first = weight.register_hook(lambda gradient: None)
    silence.begin([weight])
    second = weight.register_hook(lambda gradient: None)
    silence.begin([weight])
    assert not weight._backward_hooks
    silence.end([weight])
    assert not weight._backward_hooks
    silence.end([weight])
    assert [*weight._backward_hooks] == [first.id, second.id]


def test_an_error_in_the_middle_leaves_no_hook_and_the_next_step_is_right(
    pair: MakePair, large: Callable[[float], None]
) -> None:
    large(1)

    class Fails(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.fails and y.requires_grad:
                y.register_hook(self._fail)
            return y

        def _fail(self, gradient: Tensor) -> None:
            raise ArithmeticError("in the middle")

    both = pair(
        nn.Sequential(nn.Sequential(Fails(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)),
        {"0": "emulated:0", "1": "emulated:1"},
    )
    batch = torch.randn(8, 8)
    both.step(lambda model: model(batch).pow(2).mean())
    both.model[0][0].fails = True
    with pytest.raises(ArithmeticError, match="in the middle"):
        both.model(batch).pow(2).mean().backward()
    both.model[0][0].fails = False
    assert all(not parameter._backward_hooks for parameter in both.model.parameters())
    both.step(lambda model: model(batch).pow(2).mean())
    assert both.relative_difference < 1e-5
