"""`torch.accelerator`, torch's own face of any accelerator."""

from __future__ import annotations

import pytest
import torch

from lightning_hetero.testing import EmulatedAccelerator


def test_it_speaks_of_the_emulated_devices(accelerator: EmulatedAccelerator) -> None:
    assert torch.accelerator.is_available()
    assert str(torch.accelerator.current_accelerator()) == accelerator.name
    assert torch.accelerator.device_count() == 2


def test_it_changes_the_current_device() -> None:
    torch.accelerator.set_device_index(1)
    try:
        assert torch.accelerator.current_device_index() == torch.dev.current_device() == 1
        assert str(torch.ones(1).to("dev").device) == "dev:1"
    finally:
        torch.accelerator.set_device_index(0)
    with torch.accelerator.device_index(1):
        assert str(torch.empty(1, device="dev").device) == "dev:1"
    with pytest.raises(RuntimeError, match="invalid device ordinal 2: there are 2 emulated devices"):
        torch.accelerator.set_device_index(2)


def test_it_tells_memory(accelerator: EmulatedAccelerator, index: int) -> None:
    start = accelerator.stats(index).used_bytes
    kept = torch.empty(1000, dtype=torch.uint8, device=accelerator.devices[index])
    torch.empty(500, dtype=torch.uint8, device=kept.device)
    assert torch.accelerator.memory_allocated(index) == torch.accelerator.memory_reserved(index) == start + 1000
    assert torch.accelerator.max_memory_allocated(index) == start + 1500
    torch.accelerator.reset_peak_memory_stats(index)
    assert torch.accelerator.max_memory_allocated(index) == start + 1000

    accelerator.configure(index, cap_bytes=start + 3000)
    assert torch.accelerator.get_memory_info(index) == (2000, start + 3000)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2001, dtype=torch.uint8, device=kept.device)
    stats = torch.accelerator.memory_stats(index)
    assert (stats["num_ooms"], stats["num_device_alloc"]) == (1, 2)
    assert stats["allocated_bytes.all.current"] == start + 1000
    assert stats["allocated_bytes.all.allocated"] - stats["allocated_bytes.all.freed"] == start + 1000
    torch.accelerator.empty_cache()


def test_it_tells_what_dtypes_there_are() -> None:
    assert {torch.float64, torch.bfloat16} <= torch.accelerator.get_device_capability("dev:0")["supported_dtypes"]
