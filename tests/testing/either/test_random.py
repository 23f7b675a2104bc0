"""Every device has random numbers of its own, which equal those of the CPU for equal seeds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_hetero.testing import EmulatedAccelerator

DRAWS = {
    "rand": lambda device: torch.rand(5, device=device),
    "randn": lambda device: torch.randn(5, device=device),
    "randn_float64": lambda device: torch.randn(40, dtype=torch.float64, device=device),
    "randint": lambda device: torch.randint(100, (5,), device=device),
    "randperm": lambda device: torch.randperm(9, device=device),
    "normal": lambda device: torch.empty(5, device=device).normal_(2.0, 3.0),
    "uniform": lambda device: torch.empty(5, device=device).uniform_(2.0, 3.0),
    "bernoulli": lambda device: torch.bernoulli(torch.full((9,), 0.5, device=device)),
    "multinomial": lambda device: torch.multinomial(torch.ones(9, device=device), 4),
    "exponential": lambda device: torch.empty(5, device=device).exponential_(),
    "poisson": lambda device: torch.poisson(torch.full((9,), 3.0, device=device)),
    "dropout": lambda device: F.dropout(torch.ones(40, device=device)),
    "dropout_in_place": lambda device: F.dropout(torch.ones(40, device=device), inplace=True),
    "feature_dropout": lambda device: F.dropout2d(torch.ones(2, 5, 2, 2, device=device)),
    "alpha_dropout": lambda device: F.alpha_dropout(torch.ones(40, device=device), training=True),
    "gumbel": lambda device: F.gumbel_softmax(torch.ones(5, device=device)),
    "orthogonal": lambda device: torch.nn.init.orthogonal_(torch.empty(3, 3, device=device)),
    "kaiming": lambda device: torch.nn.init.kaiming_uniform_(torch.empty(3, 3, device=device)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_equal_seeds_give_the_numbers_of_the_cpu(device: str, name: str) -> None:
    torch.manual_seed(7)
    expected = DRAWS[name]("cpu")
    torch.manual_seed(7)
    found = DRAWS[name](device)
    assert str(found.device) == device
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(DRAWS[name](device).cpu(), expected)


def test_devices_do_not_disturb_each_other(accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices
    torch.manual_seed(3)
    expected = [torch.rand(4, device=device).cpu() for device in ("cpu", first, second) for _ in range(2)]
    torch.manual_seed(3)
    drawn = {device: [] for device in ("cpu", first, second)}
    for device in (second, "cpu", first, first, second, "cpu"):
        drawn[device].append(torch.rand(4, device=device).cpu())
    found = [numbers for of_device in drawn.values() for numbers in of_device]
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * 6


def test_the_state_can_be_kept_and_put_back(accelerator: EmulatedAccelerator, index: int) -> None:
    module, device = torch.get_device_module(accelerator.name), accelerator.devices[index]
    state, states = module.get_rng_state(index), module.get_rng_state_all()
    assert (state.dtype, state.device.type, len(states)) == (torch.uint8, "cpu", 2)
    expected = torch.rand(4, device=device)
    module.set_rng_state(state, device)
    assert torch.equal(torch.rand(4, device=device), expected)
    module.set_rng_state_all(states)
    assert torch.equal(torch.rand(4, device=device), expected)


def test_seeding_one_device_leaves_the_others(accelerator: EmulatedAccelerator) -> None:
    module = torch.get_device_module(accelerator.name)
    module.manual_seed_all(1)
    other = module.get_rng_state(1)
    with module.device(0):
        module.manual_seed(5)  # the current device
        assert module.initial_seed() == 5
    assert torch.equal(module.get_rng_state(1), other)
    with module.device(1):
        module.manual_seed(6)
        assert module.initial_seed() == 6
    with module.device(0):
        assert module.initial_seed() == 5


def test_fork_rng_puts_all_states_back(accelerator: EmulatedAccelerator) -> None:
    before = torch.get_device_module(accelerator.name).get_rng_state_all()
    with torch.random.fork_rng(devices=range(2), device_type=accelerator.name):
        torch.rand(4, device=accelerator.devices[0])
        torch.rand(4, device=accelerator.devices[1])
    after = torch.get_device_module(accelerator.name).get_rng_state_all()
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True]


def test_dropout_is_the_same_when_it_is_recomputed(device: str) -> None:
    x = torch.ones(200, device=device, requires_grad=True)
    output = checkpoint(lambda x: F.dropout(x, 0.5), x, use_reentrant=False)
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, output)  # the gradient is the mask, scaled, and so is the output


def test_dropout_outside_training_draws_nothing(accelerator: EmulatedAccelerator, index: int) -> None:
    module = torch.get_device_module(accelerator.name)
    x, before = torch.ones(5, device=accelerator.devices[index]), module.get_rng_state(index)
    assert torch.equal(F.dropout(x, training=False), x)
    assert torch.equal(F.dropout(x, p=1.0), torch.zeros_like(x))
    assert torch.equal(module.get_rng_state(index), before)
