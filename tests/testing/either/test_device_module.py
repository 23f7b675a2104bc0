"""`torch.dev` is to the emulated accelerator what `torch.cuda` is to CUDA."""

from __future__ import annotations

import pytest
import torch

from lightning_hetero.testing import EmulatedAccelerator


def test_torch_knows_it(accelerator: EmulatedAccelerator) -> None:
    module = torch.get_device_module("dev")
    assert module is torch.dev
    assert accelerator.name == "dev"
    assert accelerator.devices == ("dev:0", "dev:1")
    assert repr(accelerator) == f"EmulatedAccelerator(dev:0, dev:1; kind='{accelerator.kind}')"
    assert module.is_available()
    assert module.is_initialized()
    assert module.device_count() == accelerator.device_count == 2
    assert module.is_bf16_supported()
    assert str(torch.accelerator.current_accelerator()) == "dev"
    assert torch.accelerator.device_count() == 2


def test_devices_have_names_and_memory() -> None:
    properties = torch.dev.get_device_properties("dev:1")
    assert properties.name == torch.dev.get_device_name(1) == "Emulated device 1"
    assert torch.dev.mem_get_info(1)[1] == properties.total_memory


def test_a_device_is_spelled_in_four_ways() -> None:
    with torch.dev.device(1):
        spelled = (1, "dev:1", torch.device("dev", 1), None)
        assert {torch.dev.get_device_name(device) for device in spelled} == {"Emulated device 1"}
        assert torch.dev.get_device_name("dev") == "Emulated device 1"


def test_the_context_manager_comes_back_even_after_an_error() -> None:
    def fail() -> None:
        with torch.dev.device("dev:1"):
            assert torch.dev.current_device() == 1
            with torch.dev.device(-1):  # changes nothing
                assert torch.dev.current_device() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.dev.current_device() == 0


def test_foreign_and_missing_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a device of type 'dev', got 'cpu'"):
        torch.dev.synchronize("cpu")
    for attempt in (torch.dev.set_device, torch.dev.synchronize, torch.dev.memory_allocated, torch.dev.get_rng_state):
        with pytest.raises(RuntimeError, match="invalid device ordinal 2: there are 2 emulated devices"):
            attempt(2)


def test_what_has_nothing_to_do_does_nothing(accelerator: EmulatedAccelerator) -> None:
    before = accelerator.stats(0)
    torch.dev.init()
    torch.dev.empty_cache()
    torch.dev.synchronize()
    assert accelerator.stats(0) == before
