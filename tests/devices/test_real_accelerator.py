"""Discovery of a device type that torch does not ship: the emulated accelerator."""

from __future__ import annotations

import pytest
import torch

from lightning_hetero.devices import discover, resolve_devices

pytestmark = pytest.mark.usefixtures("accelerator")


def test_the_emulated_accelerator_is_discovered_as_two_devices_before_the_cpu() -> None:
    kind = torch._C._get_privateuse1_backend_name()
    found = discover()
    assert [device.name for device in found if device.kind == kind] == [f"{kind}:0", f"{kind}:1"]
    assert found.names[-1] == "cpu"
    assert all(device.memory_bytes > 0 for device in found)


def test_a_tensor_lives_where_the_discovered_name_says() -> None:
    kind = torch._C._get_privateuse1_backend_name()
    for device in resolve_devices(f"{kind}:*"):
        assert str(torch.ones(1, device=device.torch_device).device) == device.torch_device == device.name


def test_a_kind_with_two_devices_is_ambiguous_without_an_index() -> None:
    kind = torch._C._get_privateuse1_backend_name()
    with pytest.raises(ValueError, match=rf"'{kind}' is ambiguous: there are 2 devices of kind '{kind}'"):
        resolve_devices(torch.device(kind))
