"""User code that mixes tensors of several devices gets the numbers of one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hetero.testing.accelerator import EmulatedAccelerator


class Parts(nn.ModuleDict):
    """Three layers that stand on three devices in these tests."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__({"a": nn.Linear(3, 4), "b": nn.Linear(4, 3), "n": nn.BatchNorm1d(3)})


def l2_penalty(m: Parts, x: Tensor) -> Tensor:
    return m["b"](m["a"](x)).sum() + sum(p.pow(2).sum() for p in m.parameters())


def borrowed_weight(m: Parts, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m["a"].weight), m["b"].weight, m["b"].bias).sum()


def joined_parameters(m: Parts, x: Tensor) -> Tensor:
    return torch.cat([p.flatten() for p in m.parameters()]).norm() + x.sum()


def operators(m: Parts, x: Tensor) -> Tensor:
    y = m["a"].weight.t() @ m["b"].weight.t() * 2 - m["b"].weight @ x.new_ones(4, 3)
    return (y / (1 + m["a"].weight.abs().sum())).sum()


def stacked(m: Parts, x: Tensor) -> Tensor:
    return torch.stack([m["a"].weight.sum(), m["b"].weight.sum(), x.sum()]).prod()


def in_place_on_an_activation(m: Parts, x: Tensor) -> Tensor:
    y = m["a"](x)
    y[:, 0] = m["b"].weight.sum(1)[:2]
    y += m["a"].bias
    return y.mul_(m["b"].weight.mean()).sum()


def dropout_with_masks(m: Parts, x: Tensor) -> Tensor:
    return F.dropout(m["a"](x), 0.5).sum() + F.mse_loss(m["b"](m["a"](x)), m["b"].weight[:2, :3].clone())


@pytest.mark.parametrize(
    "step",
    [l2_penalty, borrowed_weight, joined_parameters, operators, stacked, in_place_on_an_activation, dropout_with_masks],
)
def test_losses_and_gradients_equal_those_of_one_device(
    step: Callable[[Parts, Tensor], Tensor], place: Any, accelerator: EmulatedAccelerator
) -> None:
    model, x = Parts().double(), torch.randn(2, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    place(model, {"a": accelerator.devices[0], "b": accelerator.devices[1], "n": "cpu"})
    torch.manual_seed(3)
    ours = step(model, x)
    torch.manual_seed(3)
    theirs = step(twin, x)
    assert abs(ours.item() - theirs.item()) < 1e-14
    ours.backward()
    theirs.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-13, atol=1e-14)


def test_a_moving_average_of_weights_works_across_devices(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)})
    place(model, {"student": accelerator.devices[0], "teacher": accelerator.devices[1]})
    expected = model["teacher"].weight.detach().cpu() * 0.9 + model["student"].weight.detach().cpu() * 0.1
    with torch.no_grad():
        model["teacher"].weight.mul_(0.9).add_(model["student"].weight, alpha=0.1)
    assert str(model["teacher"].weight.device) == accelerator.devices[1]
    assert torch.equal(model["teacher"].weight.cpu(), expected)


def test_comparisons_and_numpy_work_as_on_the_root(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].load_state_dict(model["a"].state_dict())
    place(model, {"a": accelerator.devices[0], "b": accelerator.devices[1]})
    assert torch.equal(model["a"].weight, model["b"].weight)
    assert model["a"].weight.detach().numpy().shape == (2, 2)


def test_autograd_grad_over_parameters_of_several_devices_is_not_disturbed(
    place: Any, accelerator: EmulatedAccelerator
) -> None:
    model = Parts()
    place(model, {"a": accelerator.devices[0], "b": accelerator.devices[1], "n": "cpu"})
    loss = model["b"](model["a"](torch.ones(2, 3))).sum()
    parameters = [*model["a"].parameters(), *model["b"].parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    assert [g.device for g in gradients] == [p.device for p in parameters]


def test_an_operation_that_writes_elsewhere_is_refused_rather_than_lost(
    place: Any, accelerator: EmulatedAccelerator
) -> None:
    model = Parts()
    place(model, {"a": accelerator.devices[0], "b": "cpu", "n": accelerator.devices[1]})
    with pytest.raises(RuntimeError):
        F.batch_norm(torch.ones(2, 3), model["n"].running_mean, model["n"].running_var, training=True)


def test_errors_that_have_nothing_to_do_with_devices_pass(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = Parts()
    place(model, {"a": accelerator.devices[0], "b": "cpu", "n": "cpu"})
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        torch.mm(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        torch.mm(model["a"].weight, torch.ones(9, 3))
