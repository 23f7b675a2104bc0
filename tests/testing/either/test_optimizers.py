"""Optimizers over parameters on two devices and the CPU take the steps that they take on the CPU alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.testing import EmulatedAccelerator

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "sgd_foreach": ("SGD", {"momentum": 0.9, "foreach": True}),
    "sgd_fused": ("SGD", {"momentum": 0.9, "fused": True}),
    "adam": ("Adam", {"foreach": False, "amsgrad": True}),
    "adam_foreach": ("Adam", {"foreach": True, "weight_decay": 0.1}),
    "adam_fused": ("Adam", {"fused": True, "amsgrad": True}),
    "adamw": ("AdamW", {}),
    "adamw_foreach": ("AdamW", {"foreach": True, "maximize": True}),
    "adamw_fused": ("AdamW", {"fused": True}),
    "adagrad": ("Adagrad", {}),
    "adagrad_foreach": ("Adagrad", {"foreach": True}),
    "adadelta": ("Adadelta", {"foreach": True}),
    "adamax": ("Adamax", {"foreach": True}),
    "nadam": ("NAdam", {"foreach": True}),
    "radam": ("RAdam", {"foreach": True}),
    "asgd": ("ASGD", {"foreach": True}),
    "rmsprop": ("RMSprop", {"foreach": True, "momentum": 0.5}),
    "rprop": ("Rprop", {"foreach": True}),
}


def parameters_on(*devices: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    return [nn.Parameter(tensor.to(devices[i % len(devices)])) for i, tensor in enumerate(made)]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], number: int) -> None:
    for i, parameter in enumerate(parameters):
        gradient = torch.linspace(-1, 1, 12, dtype=torch.float64).roll(number + i).view(3, 4)
        parameter.grad = gradient.to(parameter.device)
    optimizer.step()


def on_cpu(tensors: list[Any]) -> list[Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_on_the_cpu(accelerator: EmulatedAccelerator, name: str) -> None:
    optimizer, options = OPTIMIZERS[name]
    results = []
    for devices in (("cpu",), ("cpu", *accelerator.devices)):
        parameters = parameters_on(*devices)
        chosen = getattr(torch.optim, optimizer)(parameters, lr=0.1, **options)
        for number in range(4):
            step(chosen, parameters, number)
        results.append((on_cpu(parameters), chosen, parameters))
    (expected, _, start), (found, chosen, parameters) = results
    assert equal(found, expected)
    assert not equal(found, on_cpu(parameters_on("cpu")))
    for parameter in parameters:
        state = [value for value in chosen.state[parameter].values() if isinstance(value, Tensor) and value.dim() > 0]
        assert {value.device for value in state} <= {parameter.device}
    assert len(start) == len(parameters)


def test_gradient_clipping_sees_all_devices(accelerator: EmulatedAccelerator) -> None:
    norms = []
    for devices in (("cpu",), ("cpu", *accelerator.devices)):
        parameters = parameters_on(*devices)
        for parameter in parameters:
            parameter.grad = parameter.detach() * 2
        # torch wants a common device for the norms of foreach; one by one, they meet on the first.
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        norms.append((norm.cpu(), *on_cpu([parameter.grad for parameter in parameters])))
    assert equal(list(norms[0]), list(norms[1]))


def test_the_state_of_an_optimizer_moves_with_its_state_dict(accelerator: EmulatedAccelerator) -> None:
    """Trained on the CPU, loaded for parameters on the devices, and trained on: as if never interrupted."""
    alone = parameters_on("cpu")
    optimizer = torch.optim.Adam(alone, lr=0.1)
    step(optimizer, alone, 0)
    spread = [nn.Parameter(p.detach().to(d)) for p, d in zip(alone, accelerator.devices * 3, strict=True)]
    resumed = torch.optim.Adam(spread, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {resumed.state[parameter]["exp_avg"].device == parameter.device for parameter in spread} == {True}
    step(optimizer, alone, 1)
    step(resumed, spread, 1)
    assert equal(on_cpu(spread), on_cpu(alone))


def test_lbfgs_on_one_device(device: str) -> None:
    results = []
    for where in ("cpu", device):
        parameters = parameters_on(where)
        optimizer = torch.optim.LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe")

        def loss(parameters: list[nn.Parameter] = parameters, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = sum((parameter**2).sum() for parameter in parameters)
            value.backward()
            return value

        optimizer.step(loss)
        results.append(on_cpu(parameters))
    assert equal(*results)
