"""Storages, pinned memory, and tensors that torch lets grow."""

from __future__ import annotations

import pytest
import torch

from lightning_hetero.testing import EmulatedAccelerator


def test_storages_are_allocated_on_the_device(accelerator: EmulatedAccelerator, index: int) -> None:
    start = accelerator.stats(index).used_bytes
    storage = torch.UntypedStorage(100, device=accelerator.devices[index])
    assert str(storage.device) == accelerator.devices[index]
    assert accelerator.stats(index).used_bytes - start == 100
    assert str(storage.cpu().device) == "cpu"


def test_a_storage_can_give_its_memory_back_and_get_it_again(accelerator: EmulatedAccelerator, index: int) -> None:
    """FSDP and others free the memory of a tensor that is alive."""
    x = torch.arange(10.0, device=accelerator.devices[index])
    in_use = accelerator.stats(index).used_bytes
    x.untyped_storage().resize_(0)
    assert accelerator.stats(index).used_bytes == in_use - 40
    x.untyped_storage().resize_(40)
    assert accelerator.stats(index).used_bytes == in_use
    x.fill_(3.0)
    assert x.tolist() == [3.0] * 10


def test_a_larger_storage_keeps_its_contents(accelerator: EmulatedAccelerator, index: int) -> None:
    x = torch.arange(4.0, device=accelerator.devices[index])
    x.untyped_storage().resize_(64)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    accelerator.configure(index, cap_bytes=accelerator.stats(index).used_bytes)
    with pytest.raises(torch.OutOfMemoryError):
        x.untyped_storage().resize_(4096)
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_out_tensor_with_contents_grows(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    x, out = torch.ones(100, device=device), torch.empty(2, device=device).resize_(0)
    start = accelerator.stats(index).used_bytes
    torch.add(x, x, out=out)
    assert out.tolist() == [2.0] * 100
    assert accelerator.stats(index).used_bytes == start + 400 - 8


def test_host_memory_can_be_pinned(device: str) -> None:
    pinned = torch.arange(4.0).pin_memory()
    assert pinned.is_pinned()
    assert not torch.arange(4.0).is_pinned()
    assert torch.equal(pinned.to(device, non_blocking=True).cpu(), torch.arange(4.0))


def test_a_data_loader_pins_its_batches(accelerator: EmulatedAccelerator) -> None:
    loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=3, pin_memory=True)
    assert [(batch.is_pinned(), batch.tolist()) for batch in loader] == [
        (True, [0.0, 1.0, 2.0]),
        (True, [3.0, 4.0, 5.0]),
    ]


def test_memory_that_two_arguments_share_is_not_written_twice(device: str) -> None:
    x = torch.arange(4.0, device=device)
    with pytest.raises(
        RuntimeError, match="unsupported operation: some elements of the input tensor and the written-to"
    ):
        torch.add(x[:3], 1, out=x[1:])
