"""Autograd and training of one model over two devices and the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_hetero.testing import EmulatedAccelerator

Call = Callable[[nn.Module, Tensor], Tensor]


def plainly(stage: nn.Module, x: Tensor) -> Tensor:
    return stage(x)


def recomputed(stage: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(stage, x, use_reentrant=False)


def recomputed_by_a_second_pass(stage: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(stage, x, use_reentrant=True)


def trained(devices: list[str], call: Call = plainly, steps: int = 8) -> list[Tensor]:
    """Losses and final parameters of a model whose stages stand on these devices, one after the other."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)),
        nn.Linear(8, 3),
    ]
    stages = [stage.double().to(devices[i % len(devices)]) for i, stage in enumerate(stages)]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator, dtype=torch.float64).requires_grad_()
        hidden: Tensor = x
        for i, stage in enumerate(stages):
            hidden = call(stage, hidden.to(devices[i % len(devices)]))
        loss = F.cross_entropy(hidden, torch.randint(3, (16,), generator=generator).to(hidden.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return [*losses, *(parameter.detach().cpu() for parameter in parameters)]


@pytest.mark.parametrize("call", [plainly, recomputed, recomputed_by_a_second_pass])
@pytest.mark.parametrize(
    "devices",
    [["dev:0", "dev:1"], ["dev:1", "dev:0"], ["cpu", "dev:1"], ["dev:1", "cpu"], ["dev:0", "dev:1", "cpu"], ["dev:1"]],
    ids="|".join,
)
def test_training_over_devices_equals_training_on_the_cpu(
    accelerator: EmulatedAccelerator, devices: list[str], call: Call
) -> None:
    expected, found = trained(["cpu"], call), trained(devices, call)
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * len(expected)


def test_second_derivatives_cross_devices(accelerator: EmulatedAccelerator) -> None:
    def curvature(first: str, second: str) -> Tensor:
        x = torch.linspace(-1, 1, 5, dtype=torch.float64).to(first).requires_grad_()
        y = (x.tanh().to(second) ** 3).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.square().sum().backward()
        assert x.grad is not None
        return x.grad.cpu()

    assert torch.equal(curvature(*accelerator.devices), curvature("cpu", "cpu"))


def test_gradients_accumulate_where_the_parameter_is(accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices
    x = torch.ones(3, device=first, requires_grad=True)
    (x.sum() + (x * 2).to(second).sum().to(first)).backward()
    assert x.grad is not None
    assert str(x.grad.device) == first
    assert x.grad.tolist() == [3.0] * 3


def test_gradients_agree_with_finite_differences(accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices
    x = torch.randn(4, dtype=torch.float64, device=first, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (x.sin().to(second) * 2).exp(), x)


def test_hooks_and_own_functions_run_with_tensors_of_the_device(device: str) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            seen.append(str(gradient.device))
            return gradient * 2

    seen: list[str] = []
    x = torch.ones(2, device=device, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(str(gradient.device)))
    Double.apply(x).sum().backward()
    assert seen == [device, device]
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


def test_an_error_in_backward_arrives_where_backward_was_called(device: str) -> None:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise ValueError("on purpose")

    x = torch.ones(2, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="on purpose"):
        Fail.apply(x * 2).sum().backward()
