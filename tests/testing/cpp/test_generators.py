"""`torch.Generator` objects of a device."""

from __future__ import annotations

import pytest
import torch


def test_a_generator_gives_the_numbers_of_the_cpus(device: str) -> None:
    here, there = torch.Generator().manual_seed(4), torch.Generator(device).manual_seed(4)
    assert (str(there.device), there.initial_seed()) == (device, 4)
    for _ in range(2):
        found = torch.randn(5, generator=there, device=device)
        assert torch.equal(found.cpu(), torch.randn(5, generator=here))


def test_it_is_independent_of_the_device(device: str) -> None:
    before = torch.dev.get_rng_state(device)
    torch.randn(5, generator=torch.Generator(device), device=device)
    assert torch.equal(torch.dev.get_rng_state(device), before)


def test_its_state_can_be_kept_put_back_and_cloned(device: str) -> None:
    generator = torch.Generator(device)
    generator.seed()
    state, clone = generator.get_state(), generator.clone_state()
    expected = torch.rand(3, generator=generator, device=device)
    generator.set_state(state)
    assert torch.equal(torch.rand(3, generator=generator, device=device), expected)
    assert torch.equal(torch.rand(3, generator=clone, device=device), expected)


def test_a_generator_of_another_device_is_refused(device: str) -> None:
    message = rf'a generator of {device} but found one of cpu\. Make it with torch.Generator\(device="{device}"\)'
    with pytest.raises(RuntimeError, match=message):
        torch.randn(3, generator=torch.Generator(), device=device)
