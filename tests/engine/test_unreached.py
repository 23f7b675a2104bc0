"""Inputs that the loss does not see: what is before them gets no gradient, as on one device, and not one of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.testing.rows import rows

MakePair = Callable[..., Any]
ROUNDING = 1e-12


class _Round(torch.autograd.Function):
    """Passes gradients straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, digits: int) -> Tensor:
        return x.round(decimals=digits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient, None


def rounds(x: Tensor) -> Tensor:
    return _Round.apply(x, 3)  # type: ignore[no-any-return, no-untyped-call]


def runs_again(x: Tensor) -> Tensor:
    return checkpoint(torch.sin, x, use_reentrant=True)  # type: ignore[no-any-return]


class Hooked(nn.Module):
    """Has a hook that wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(lambda module, before, after: (before[0] + 1,))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Heads(nn.Module):
    """Two heads, each with an input of its own. Shapes (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(y)


class First(Heads):
    """Uses one of its inputs."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Towers(nn.Module):
    """Two encoders, one of them followed by code with a backward of its own."""

    def __init__(self, own: Callable[[Tensor], Tensor], heads: nn.Module, in_forward: bool) -> None:
        super().__init__()
        self.first, self.second, self.heads = nn.Linear(8, 8), nn.Linear(8, 8), heads
        self.own = own
        self.in_forward = in_forward

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.first(x), self.own(3 * self.second(x)) * 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.outputs(x)


def losses(used: str) -> Callable[[Any], Tensor]:
    def loss(model: Any) -> Tensor:
        outputs = model(rows(8)) if model.in_forward else model.outputs(rows(8))
        seen = [outputs["ab".index(name)].pow(2).mean() for name in used]
        return torch.stack(seen).sum()

    return loss


def _compiled(x: Tensor) -> Tensor:
    return torch.sin(x) * x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
@pytest.mark.parametrize("heads", [Heads, First])
@pytest.mark.parametrize("own", [rounds, runs_again, "hooked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_forward", [False, True], ids=["before", "inside"])
def test_what_the_loss_does_not_see_has_no_gradient(
    pair: MakePair, heads: type[Heads], own: Any, in_forward: bool
) -> None:
    if own == "compiled":
        own = torch.compile(_compiled, backend="aot_eager")
    own = Hooked() if own == "hooked" else own
    both = pair(Towers(own, heads(), in_forward).double())
    for used in ("ab", "a", "ab", "b", "a"):
        both.step(losses(used))
        assert both.difference < ROUNDING


@pytest.mark.parametrize("in_forward", [False, True], ids=["before", "inside"])
def test_a_second_backward_through_the_same_graph_reaches_it(pair: MakePair, in_forward: bool) -> None:
    both = pair(Towers(rounds, Heads(), in_forward).double())

    def gradients(model: Any) -> list[Tensor | None]:
        model.zero_grad()
        a, b = model(rows(8)) if in_forward else model.outputs(rows(8))
        a.pow(2).mean().backward(retain_graph=True)
        first = model.second.weight.grad
        b.pow(2).mean().backward()
        return [first, *(parameter.grad for parameter in model.parameters())]

    for _ in range(3):
        assert gradients(both.model)[0] is None
        for found, expected in zip(gradients(both.model), gradients(both.alone), strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.allclose(found.cpu(), expected, rtol=0, atol=ROUNDING)
    assert both.calls
