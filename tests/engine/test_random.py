"""Random numbers depend on seed, micro-batch and call, and on nothing that changes from run to run."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hetero.testing.cut_models import Between


class Dropping(nn.Module):
    """Dropout inside of placed modules, between them, and as a function. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)
        )
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.drop(block(x))
        return self.out(F.dropout(x, 0.1, self.training))  # type: ignore[no-any-return]


def rows(count: int = 10) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def train(model: nn.Module, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(11)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rows()).pow(2).mean().backward()
        optimizer.step()
    return [p.detach().cpu().clone() for p in model.parameters()]


def slowly(model: nn.Module) -> None:
    """Delays in an order that changes from call to call, in every placed module."""

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(os.urandom(1)[0] / 256 * 2e-3)  # a generator would be state
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            time.sleep(os.urandom(1)[0] / 256 * 2e-3)  # a generator would be state
            return gradient

    for block in model.blocks:
        block[0].forward = lambda x, linear=block[0]: Late.apply(F.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("rematerialize", [False, True])
def test_twenty_runs_of_the_same_seed_are_equal_bit_for_bit(pair: Any, rematerialize: bool) -> None:
    model = Dropping().double()
    first: list[Tensor] | None = None
    for _ in range(20):
        both = pair(model, no_split=("Sequential",), rematerialize=rematerialize)
        slowly(both.model)
        found = train(both.model)
        assert both.calls == 3
        both.close()
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_keeping_activations_or_not_drops_the_same(pair: Any) -> None:
    model = Dropping().double()
    kept, again = (train(pair(model, rematerialize=flag).model) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_another_placement_on_the_cpu_drops_the_same(pair: Any) -> None:
    model = Dropping().double()
    names = ("blocks.0", "blocks.1", "blocks.2", "out")
    runs = []
    for order in ((0, 1, 2, 0), (1, 1, 0, 2), (2, 0, 2, 1)):
        where = {name: f"emulated:{device}" for name, device in zip(names, order, strict=True)}
        both = pair(model, where, on="cpu@speed=1,cpu@speed=1,cpu@speed=1", no_split=("Sequential",))
        runs.append(train(both.model))
        assert both.calls == 3
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_micro_batches_and_steps_drop_differently(pair: Any) -> None:
    both = pair(Between(lambda model, x: F.dropout(x * 0 + 1, 0.5, model.training)))
    masks = [mask for _ in range(2) for mask in both.model(torch.randn(8, 8)).detach().cpu().split(2)]
    assert both.calls == 2
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 8


def test_a_cut_call_takes_one_number_from_the_global_generator(pair: Any) -> None:
    both = pair(Dropping().double())
    torch.manual_seed(2)
    torch.randint(1 << 62, ())
    expected = torch.get_rng_state()
    torch.manual_seed(2)
    both.model(rows())
    assert both.calls == 1
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_region_that_draws_nothing_takes_none(pair: Any) -> None:
    both = pair(Dropping().double())
    both.model.eval()
    state = torch.get_rng_state()
    both.model(rows())
    assert both.calls == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_region_that_runs_whole_draws_what_one_device_draws(pair: Any) -> None:
    model = Between(lambda model, x: model.drop(x) - x.mean(0), drop=nn.Dropout(0.5)).double()
    both = pair(model, on="cpu@speed=1,cpu@speed=1")
    assert all(torch.equal(a, b) for a, b in zip(train(both.model), train(both.alone), strict=True))
    assert both.calls == 0


def test_dropout_scales_as_on_one_device(pair: Any) -> None:
    """The mean over many masks is the output without dropout."""
    both = pair(Between(lambda model, x: model.drop(x), drop=nn.Dropout(0.5)).double())
    x = rows(4)
    torch.manual_seed(0)
    mean = torch.stack([both.model(x).detach() for _ in range(400)]).mean(0)
    both.alone.eval()
    with torch.no_grad():
        spread = both.alone.b.weight.abs().sum(1).max() * both.alone.a(x).abs().max() / 400**0.5
        assert float((mean.cpu() - both.alone(x)).abs().max()) < 4 * float(spread)


def test_recomputation_inside_a_part_repeats_its_masks(pair: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def body(self, x: Tensor) -> Tensor:
            return F.dropout(self.linear(x), 0.5, self.training)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.body, x, use_reentrant=False)
            return result

    class Kept(Again):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    results = []
    for kind in (Again, Kept):
        torch.manual_seed(0)
        results.append(train(pair(nn.Sequential(kind(), kind(), nn.Linear(8, 4)).double()).model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
