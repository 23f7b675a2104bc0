"""Cut into micro-batches, a model gives the outputs and gradients of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hetero.testing.cut_models import Choosy, Everything, Hourglass, Twice
from lightning_hetero.testing.models import MODELS

EXACT = 1e-12  # float64; sums over micro-batches are made in another order than over the whole batch


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("micro_batches", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_of_every_model(name: str, micro_batches: int, pair: Any) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    both = pair(make().double(), micro_batches=micro_batches)
    for rows in (16, 10, 3, 1):  # ragged ones, and fewer rows than micro-batches
        x = data(rows, generator())
        both.step(lambda model, x=x: model(x).pow(2).mean())
        assert both.difference < EXACT
        assert torch.allclose(both.model(x).cpu(), both.alone(x), rtol=0, atol=EXACT)


def test_what_can_be_cut_is_cut(pair: Any) -> None:
    cut = {}
    for name, (make, data) in MODELS.items():
        both = pair(make().double())
        both.model(data(8, generator()))
        cut[name] = both.calls
    assert cut == {**dict.fromkeys(MODELS, 1), "in_place_residual": 0}


@pytest.mark.parametrize("rematerialize", [False, True])
def test_float32_differs_by_rounding_only(pair: Any, rematerialize: bool) -> None:
    for name, (make, data) in MODELS.items():
        torch.manual_seed(0)
        both = pair(make(), rematerialize=rematerialize)
        x = data(10, generator())
        x = x.float() if x.is_floating_point() else x
        both.step(lambda model, x=x: model(x).pow(2).mean())
        assert both.relative_difference < 1e-6, name


@pytest.mark.parametrize("name", MODELS)
def test_rematerialized_forwards_give_the_same_gradients(name: str, pair: Any) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    both = pair(make().double(), rematerialize=True)
    x = data(10, generator())
    for _ in range(2):
        both.step(lambda model: model(x).pow(2).mean())
        assert both.difference < EXACT


@given(rows=st.lists(st.integers(1, 20), min_size=1, max_size=4), micro_batches=st.integers(2, 9))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_batch_sizes(pair: Any, rows: list[int], micro_batches: int) -> None:
    both = pair(MODELS["mlp"][0]().double(), micro_batches=micro_batches)
    for size in rows:
        x = torch.randn(size, 8, dtype=torch.float64)
        both.step(lambda model, x=x: model(x).pow(2).sum())
        assert both.difference < EXACT * size


@pytest.mark.parametrize("rotation", range(3))
def test_skips_over_three_devices(pair: Any, devices: str, rotation: int) -> None:
    names = devices.split(",")
    both = pair(Hourglass().double(), on=",".join(names[rotation:] + names[:rotation]))
    x = torch.randn(9, 8, dtype=torch.float64)
    both.step(lambda model: model(x).pow(2).mean())
    assert both.difference < EXACT
    assert both.calls == 1


def test_a_module_that_is_called_twice(pair: Any) -> None:
    both = pair(Twice().double())
    x = torch.randn(10, 8, dtype=torch.float64)
    both.step(lambda model: model(x).pow(2).mean())
    assert both.difference < EXACT
    assert both.calls == 1


def test_dicts_dataclasses_none_and_numbers_pass(pair: Any) -> None:
    both = pair(Everything().double())
    x, shift = torch.randn(10, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        out = model({"x": x, "nothing": None}, factor=2.0, shift=shift, flags=[True, "text"])
        assert out["left"].rows.shape == (10, 4)
        assert out["nothing"] is None
        assert out["factor"] == 2.0
        assert out["choice"].dtype == torch.int64
        total: Tensor = out["left"].rows.pow(2).mean() + out["right"][1].abs().sum()
        return total

    both.step(loss)
    assert both.difference < EXACT
    assert both.calls == 1


def test_inputs_get_their_gradients_cut_ones_and_whole_ones(pair: Any) -> None:
    both = pair(Everything().double())
    x, shift = torch.randn(10, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    found = []
    for model in (both.model, both.alone):
        a, b = x.clone().requires_grad_(), shift.clone().requires_grad_()
        model({"x": a, "nothing": None}, factor=0.5, shift=b * 2, flags=[])["left"].rows.pow(3).sum().backward()
        found.append((a.grad, b.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    assert both.calls == 1


def test_a_decision_by_content_is_made_for_the_whole_batch(pair: Any) -> None:
    both = pair(Choosy().double())
    for shift in (0.0, -100.0, 0.3):
        x = torch.randn(10, 8, dtype=torch.float64) + shift
        both.step(lambda model, x=x: model(x).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 0
    assert both.engine.reasons == [
        "Choosy is not cut into micro-batches, because its code reads the content of a tensor (__bool__)"
    ]


def test_shapes_may_change_in_every_step(pair: Any) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()).sum(1)  # type: ignore[no-any-return]

    both = pair(Sequence().double())
    for rows, length in ((8, 3), (5, 11), (12, 1), (8, 8)):
        x = torch.randn(rows, length, 3, dtype=torch.float64)
        both.step(lambda model, x=x: model(x).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 4


@pytest.mark.parametrize("frozen", ["first", "second", "third"])
def test_frozen_stages(pair: Any, frozen: str) -> None:
    model = MODELS["mlp"][0]().double()
    getattr(model, frozen).requires_grad_(False)
    both = pair(model)
    x = torch.randn(10, 8, dtype=torch.float64)
    both.step(lambda model: model(x).pow(2).mean())
    assert both.difference < EXACT
    both.model.requires_grad_(False)
    assert not both.model(x).requires_grad


def test_freezing_between_forward_and_backward_does_not_matter(pair: Any) -> None:
    both = pair(MODELS["mlp"][0]().double())
    x = torch.randn(10, 8, dtype=torch.float64)
    for model in (both.model, both.alone):
        loss = model(x).pow(2).mean()
        model.first.requires_grad_(False)
        loss.backward()
    assert both.difference < EXACT


def test_autocast_reaches_the_workers(pair: Any) -> None:
    both = pair(MODELS["mlp"][0](), on="cpu@speed=1,cpu@speed=1")
    x = torch.randn(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = both.model(x), both.alone(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    ours.float().pow(2).mean().backward()
    theirs.float().pow(2).mean().backward()
    assert both.calls == 1
    assert both.difference < 2e-2  # bfloat16 has two to three digits, and sums are made in another order


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(pair: Any, mode: Any) -> None:
    both = pair(MODELS["tied_transformer"][0]().double())
    x = MODELS["tied_transformer"][1](10, generator())
    with mode():
        assert torch.allclose(both.model(x).cpu(), both.alone(x), rtol=0, atol=EXACT)
    assert both.calls == 1


def test_batch_norm_trains_on_whole_batches_and_is_cut_in_evaluation(pair: Any) -> None:
    both = pair(MODELS["convnet"][0]().double())
    x = MODELS["convnet"][1](10, generator())
    both.step(lambda model: model(x).pow(2).mean())
    assert both.difference < EXACT
    for ours, theirs in zip(both.model.buffers(), both.alone.buffers(), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert "features.1 (BatchNorm2d) uses the mean and variance of the whole batch" in both.engine.reasons[0]
    before = both.calls
    both.model.eval()
    both.alone.eval()
    assert torch.allclose(both.model(x).cpu(), both.alone(x), rtol=0, atol=EXACT)
    assert both.calls == before + 1
