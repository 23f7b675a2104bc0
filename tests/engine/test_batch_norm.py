"""Deferred batch normalisation: statistics of micro-batches for the outputs, of the whole batch for the buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hetero.runtime.engine.batch_norm import Moments
from lightning_hetero.testing.models import MODELS

EXACT = 1e-12


class Normalised(nn.Module):
    """A layer that is normalised twice a call, by two modules. Input (rows, 8)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6, **options)
        self.b = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(self.b(self.norm(self.a(x)))))  # type: ignore[no-any-return]


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_moments_of_parts_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    x = torch.randn(sum(sizes), 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10 + 100
    first, *others = [Moments.of(part) for part in x.split(sizes)]
    for other in others:
        first = first + other
    assert first.count == sum(sizes) * 2
    assert torch.allclose(first.mean, x.mean((0, 2)), rtol=1e-12)
    assert torch.allclose(first.deviation / first.count, x.var((0, 2), correction=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rematerialize", [False, True])
def test_gradients_are_those_of_accumulation_over_micro_batches(pair: Any, rematerialize: bool) -> None:
    both = pair(Normalised().double(), defers_batch_norm=True, rematerialize=rematerialize)
    x = rows(10)
    both.model.zero_grad()
    both.model(x).pow(2).sum().backward()
    for part in x.split([3, 3, 2, 2]):
        both.alone(part).pow(2).sum().backward()
    assert both.calls == 1
    assert both.difference < EXACT


def test_a_first_normalisation_has_the_running_statistics_of_the_whole_batch(pair: Any) -> None:
    """Later ones see inputs that were normalised by micro-batch, which differ from those of one device."""
    make, data = MODELS["convnet"]
    both = pair(make().double(), defers_batch_norm=True)
    for seed in range(3):
        x = data(10, torch.Generator().manual_seed(seed))
        both.step(lambda model, x=x: model(x).pow(2).mean())
    ours, theirs = both.model.features[1], both.alone.features[1]
    assert torch.allclose(ours.running_mean.cpu(), theirs.running_mean, rtol=0, atol=EXACT)
    assert torch.allclose(ours.running_var.cpu(), theirs.running_var, rtol=0, atol=EXACT)
    assert int(both.model.features[4].num_batches_tracked) == 3
    assert both.calls == 3


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.5}, {"affine": False}])
@pytest.mark.parametrize("rematerialize", [False, True])
def test_every_kind_of_momentum(pair: Any, options: dict[str, Any], rematerialize: bool) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(8, **options), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.norm(x)))  # type: ignore[no-any-return]

    both = pair(First().double(), defers_batch_norm=True, rematerialize=rematerialize)
    for seed in range(3):
        both.model(rows(9, seed)).sum().backward()
        both.alone(rows(9, seed))
    for ours, theirs in zip(both.model.norm.buffers(), both.alone.norm.buffers(), strict=True):
        assert torch.allclose(ours.cpu().double(), theirs.double(), rtol=0, atol=EXACT)
    assert both.model.norm.track_running_stats


def test_a_failure_leaves_the_modules_as_they_were(pair: Any) -> None:
    both = pair(Normalised().double(), defers_batch_norm=True)
    both.model(rows(8))
    hooks = len(both.model.norm._forward_pre_hooks)
    before = copy.deepcopy(both.model.state_dict())
    with pytest.raises(RuntimeError):
        both.model(rows(8)[:, :3])
    assert both.model.norm.track_running_stats
    assert len(both.model.norm._forward_pre_hooks) == hooks
    after = both.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
