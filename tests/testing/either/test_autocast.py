"""Autocast chooses precisions as it does on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_matrix_products_are_low_and_sums_are_full_precision(device: str, low: torch.dtype) -> None:
    x, w = torch.randn(4, 4, device=device), torch.randn(4, 4, device=device)
    image, kernel = torch.randn(1, 2, 5, 5, device=device), torch.randn(3, 2, 3, 3, device=device)
    with torch.autocast("dev", dtype=low):
        assert {y.dtype for y in (x @ w, F.linear(x, w), torch.addmm(x, x, w), F.conv2d(image, kernel))} == {low}
        assert {y.dtype for y in (x.to(low).softmax(-1), x.to(low).sum(), x.to(low).exp())} == {torch.float32}
        assert F.layer_norm(x.to(low), (4,)).dtype is torch.float32
        assert F.mse_loss(x.to(low), w.to(low)).dtype is torch.float32
        assert torch.relu(x.to(low)).dtype is low  # in neither list: as it comes
        assert (x.double() @ w.double()).dtype is torch.float64
    assert (x @ w).dtype is torch.float32


def test_the_numbers_are_those_of_a_cast_by_hand(device: str) -> None:
    x, w = torch.randn(4, 6), torch.randn(3, 6)
    with torch.autocast("dev", dtype=torch.bfloat16):
        found = F.linear(x.to(device), w.to(device))
    assert torch.equal(found.cpu(), F.linear(x.bfloat16(), w.bfloat16()))


def test_gradients_of_parameters_keep_full_precision(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    with torch.autocast("dev", dtype=torch.bfloat16):
        output = model(torch.randn(5, 4, device=device))
        loss = F.cross_entropy(output, torch.zeros(5, dtype=torch.long, device=device))
    assert (output.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_of_the_cpu_does_not_touch_devices(device: str) -> None:
    x = torch.randn(4, 4, device=device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.float32
    with torch.autocast("dev", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_it_can_be_switched_off_inside(device: str) -> None:
    x = torch.randn(4, 4, device=device)
    with torch.autocast("dev", dtype=torch.bfloat16):
        with torch.autocast("dev", enabled=False):
            assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is torch.bfloat16


def test_a_recurrent_layer_runs_in_low_precision(device: str) -> None:
    layer: nn.Module = nn.LSTM(4, 3).to(device)
    with torch.autocast("dev", dtype=torch.bfloat16):
        output: Tensor = layer(torch.randn(5, 2, 4, device=device))[0]
    assert output.dtype is torch.bfloat16
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_gradients_are_scaled_and_a_step_with_infinities_is_skipped(device: str) -> None:
    parameter = nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("dev", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [4.0, 4.0]
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [0.0, 0.0]
    parameter.grad = torch.full_like(parameter, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 2.0


def test_a_dtype_that_the_devices_do_not_offer_is_refused_with_a_warning(device: str) -> None:
    x = torch.randn(4, 4, device=device)
    with pytest.warns(UserWarning, match="In dev autocast, but the target dtype is not supported"):
        context = torch.autocast("dev", dtype=torch.float64)
    with context:
        assert (x @ x).dtype is torch.float32
