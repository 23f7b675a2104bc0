"""Gradients of micro-batches are added up in place where nobody else has them, and nowhere else."""

from __future__ import annotations

import weakref
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


def test_lanes_are_added_up_in_order_and_in_each_of_them_calls_from_the_last_to_the_first() -> None:
    weight = torch.zeros(1, requires_grad=True)
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8, 3.0, 1e8, -5.0)]  # whose sum depends on the order
    expected = ((parts[2] + parts[1]) + parts[0]) + ((parts[5] + parts[4]) + parts[3])
    orders = [(2, 1, 0, 5, 4, 3), (0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (3, 0, 5, 2, 4, 1)]
    for order in orders:
        sums = OrderedSums()
        for lane in range(2):
            sums.announce(lane, ["other", "unit", "unit", "other", "unit"])
        for index in order:
            sums.add("unit", index // 3, (1, 2, 4)[index % 3], [weight], [parts[index].clone()])
        for lane in range(2):
            sums.end(lane)
        assert torch.equal(sums.totals()[id(weight)], expected)


def test_a_call_that_brings_nothing_is_left_out() -> None:
    weight = torch.zeros(1, requires_grad=True)
    for silent in range(3):
        sums = OrderedSums()
        sums.announce(0, ["unit"] * 3)
        for number in {0, 1, 2} - {silent}:
            sums.add("unit", 0, number, [weight], [torch.tensor([2.0**number])])
        sums.end(0)
        assert sums.totals()[id(weight)].item() == 7.0 - 2.0**silent


def test_of_many_calls_one_gradient_is_kept() -> None:
    weight, sums = torch.zeros(4, requires_grad=True), OrderedSums()
    kept = []
    sums.announce(0, ["other"])
    sums.announce(1, ["unit"] * 8)
    for number in reversed(range(8)):
        gradient = torch.ones(4)
        kept.append(weakref.ref(gradient))
        sums.add("unit", 1, number, [weight], [gradient])
        del gradient
    assert sum(ref() is not None for ref in kept) <= 1  # though the lane before it has not ended


def test_a_backward_waits_for_those_of_lower_lanes_that_come_once() -> None:
    weight, sums = torch.zeros(1, requires_grad=True), OrderedSums()
    assert not sums.is_turn_of("unit", 1)  # nobody knows yet what lane 0 brings
    sums.announce(0, ["unit", "twice", "twice"])
    assert sums.is_turn_of("unit", 0)
    assert not sums.is_turn_of("unit", 1)
    assert sums.is_turn_of("twice", 1)  # meanwhile other devices have their turn
    assert sums.is_turn_of("never called", 1)
    sums.announce(1, ["unit"])
    sums.add("unit", 0, 0, [weight], [torch.ones(1)])
    assert sums.is_turn_of("unit", 1)
    assert not sums.is_turn_of("unit", 2)
    sums.end(1)  # without it
    sums.announce(2, ["unit"])
    assert sums.is_turn_of("unit", 2)


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
