"""Gradients of micro-batches are added up in place where nobody else has them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.leaves import OrderedSums

MakePair = Callable[..., Any]
LANES = 3


def summed(make: Callable[[int], tuple[list[Tensor], list[Tensor]]]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of what `make(lane)` returns, leaves and their gradients; and what these gradients were before."""
    sums = OrderedSums()
    leaves: list[Tensor] = []
    before: list[Tensor] = []
    for lane in range(LANES):
        sums.announce(lane, ["unit"])
        leaves, found = make(lane)
        before += [gradient.clone() for gradient in found]
        sums.add("unit", lane, 0, leaves, found)
        del found
        sums.end(lane)
    totals = sums.totals()
    return [totals[id(leaf)] for leaf in leaves], before


def test_the_first_gradient_becomes_the_sum() -> None:
    weight, pointers = torch.randn(4, 4, requires_grad=True), []

    def make(lane: int) -> tuple[list[Tensor], list[Tensor]]:
        found = torch.autograd.grad((torch.full((3, 4), 1.0 + lane) @ weight.t()).sum(), weight)
        pointers.append(found[0].data_ptr())
        return [weight], list(found)

    (total,), before = summed(make)
    assert total.data_ptr() == pointers[0]
    assert torch.equal(total, before[0] + before[1] + before[2])


def test_a_gradient_of_two_leaves_is_not_changed() -> None:
    first, second = (torch.randn(4, requires_grad=True) for _ in range(2))

    def make(lane: int) -> tuple[list[Tensor], list[Tensor]]:
        return [first, second], list(torch.autograd.grad(((first + second) * (1.0 + lane)).sum(), (first, second)))

    totals, _ = summed(make)
    assert all(torch.equal(total, torch.full((4,), 6.0)) for total in totals)


@pytest.mark.parametrize("how", ["itself", "view", "base", "detached"])
def test_a_gradient_that_user_code_keeps_is_not_changed(how: str) -> None:
    weight, kept = torch.randn(4, requires_grad=True), []

    def make(lane: int) -> tuple[list[Tensor], list[Tensor]]:
        whole = torch.full((2, 4), 1.0 + lane)
        gradient = whole[0]
        kept.append({"itself": gradient, "view": gradient[:2], "base": whole, "detached": gradient.detach()}[how])
        return [weight], [gradient]

    totals, _ = summed(make)
    assert torch.equal(totals[0], torch.full((4,), 6.0))
    assert [float(each.flatten()[0]) for each in kept] == [1.0, 2.0, 3.0]


def test_one_number_that_stands_for_all() -> None:
    weight = torch.randn(4, 3, requires_grad=True)

    def make(lane: int) -> tuple[list[Tensor], list[Tensor]]:
        (gradient,) = torch.autograd.grad(weight.sum() * (1.0 + lane), weight)
        assert gradient.stride() == (0, 0)
        return [weight], [gradient]

    (total,), _ = summed(make)
    assert torch.equal(total, torch.full((4, 3), 6.0))


class Odd(nn.Module):
    """Gradients of all sorts: one number seen often, one for two weights, a transpose, sparse. Input (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))
        self.linear = nn.Linear(4, 4).double()
        self.table = nn.Embedding(8, 4, sparse=True).double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table((x[:, 0].abs() * 8).long().clamp(max=7))
        return self.linear(x) + rows + (self.a + self.b) + self.a.sum()  # type: ignore[no-any-return]


def test_a_module_with_all_of_them(pair: MakePair, devices: str) -> None:
    first, second = ("emulated:0", "emulated:1") if "speed" in devices else devices.split(",")[:2]
    both = pair(nn.Sequential(Odd(), nn.Linear(4, 4).double()), {"0": first, "1": second})
    for _ in range(3):
        both.step(lambda model: model(torch.linspace(-1, 1, 48, dtype=torch.float64).view(12, 4)).pow(2).mean())
        for mine, alone in zip(both.model.parameters(), both.alone.parameters(), strict=True):
            assert mine.grad.is_sparse == alone.grad.is_sparse
            torch.testing.assert_close(mine.grad.to_dense().cpu(), alone.grad.to_dense(), rtol=0, atol=1e-13)
    assert not both.engine.reasons
