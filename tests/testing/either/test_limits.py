"""A device that is smaller, slower or poorer than the host."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_hetero.testing import EmulatedAccelerator


def test_out_of_memory_is_torchs_error_and_tells_the_numbers(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    in_use = accelerator.stats(index).used_bytes
    kept = torch.empty(600, dtype=torch.uint8, device=device)
    accelerator.configure(index, cap_bytes=in_use + 1000)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(401, dtype=torch.uint8, device=device)
    assert str(caught.value).startswith(
        f"{device} is out of memory. Tried to allocate 401 bytes, but {in_use + 600} of its {in_use + 1000} bytes are "
        "in use."
    )
    assert torch.empty(400, dtype=torch.uint8, device=device).nbytes == 400
    assert accelerator.stats(index).ooms == 1
    assert accelerator.stats(index).used_bytes == in_use + kept.nbytes


def test_every_way_to_get_memory_can_fail(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    x, small = torch.ones(100, device=device), torch.ones(2, device=device)
    host = torch.ones(100)
    in_use = accelerator.stats(index).used_bytes
    accelerator.configure(index, cap_bytes=in_use + 399)
    for attempt in (
        lambda: host.to(device),
        lambda: x.clone(),
        lambda: x * 2,
        lambda: torch.zeros(100, device=device),
        lambda: torch.randn(100, device=device),
        lambda: torch.cat([x, x]),
        lambda: small.resize_(200),
        lambda: torch.mul(x, 2, out=torch.empty(0, device=device)),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            attempt()
    x.mul_(2)  # needs no memory
    assert accelerator.stats(index).ooms == 8
    assert accelerator.stats(index).used_bytes == in_use


def test_a_backward_pass_that_runs_out_of_memory_can_be_repeated(accelerator: EmulatedAccelerator, index: int) -> None:
    layer = torch.nn.Linear(50, 50).to(accelerator.devices[index])
    x = torch.randn(20, 50, device=accelerator.devices[index])
    loss = layer(x).square().mean()
    accelerator.configure(index, cap_bytes=accelerator.stats(index).used_bytes + 1000)
    with pytest.raises(torch.OutOfMemoryError, match=f"{accelerator.devices[index]} is out of memory"):
        loss.backward(retain_graph=True)
    accelerator.configure(index)
    layer.zero_grad()
    loss.backward()
    assert layer.weight.grad is not None


def test_a_cap_below_what_is_in_use_leaves_it_there(accelerator: EmulatedAccelerator, index: int) -> None:
    kept = torch.ones(10, device=accelerator.devices[index])
    accelerator.configure(index, cap_bytes=0)
    assert kept.add_(1).tolist() == [2.0] * 10
    with pytest.raises(torch.OutOfMemoryError, match="of its 0 bytes are in use"):
        kept.clone()


def test_the_cap_is_the_total_memory_that_programs_see(accelerator: EmulatedAccelerator, index: int) -> None:
    module = torch.get_device_module(accelerator.name)
    whole = module.get_device_properties(index).total_memory
    assert whole > 2**30  # that of the host
    kept = torch.empty(100, dtype=torch.uint8, device=accelerator.devices[index])
    in_use = accelerator.stats(index).used_bytes
    accelerator.configure(index, cap_bytes=in_use + 900)
    assert module.get_device_properties(index).total_memory == in_use + 900
    assert module.mem_get_info(index) == (900, in_use + 900)
    accelerator.configure(index, cap_bytes=in_use - kept.nbytes)
    assert module.mem_get_info(index)[0] == 0
    accelerator.configure(index)
    assert module.get_device_properties(index).total_memory == whole


def test_a_missing_dtype_is_a_type_error_as_on_mps(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    x = torch.ones(2, device=device)
    accelerator.configure(index, missing_dtypes=[torch.float64, torch.bfloat16])
    message = re.escape(
        f"{device} does not support torch.float64. Use another dtype, or place this tensor on another device."
    )
    for attempt in (
        lambda: torch.ones(2, dtype=torch.float64, device=device),
        lambda: torch.ones(2, dtype=torch.float64).to(device),
        lambda: x.double(),
        lambda: x.sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match=message):
            attempt()
    with pytest.raises(TypeError, match=r"does not support torch\.bfloat16"):
        x.bfloat16()
    assert x.half().dtype is torch.float16
    assert torch.ones(2, dtype=torch.float64, device=accelerator.devices[1 - index]).dtype is torch.float64


def test_launches_make_every_kernel_wait(accelerator: EmulatedAccelerator, index: int) -> None:
    x = torch.ones(4, device=accelerator.devices[index])
    accelerator.configure(index, launch_s=0.001)
    x.add_(1).mul_(2)
    x.view(2, 2).t()
    x.cpu()  # a transfer, no kernel
    assert accelerator.stats(index).waited_s == pytest.approx(0.002)
    assert accelerator.stats(1 - index).waited_s == 0


def test_a_link_makes_every_transfer_wait(accelerator: EmulatedAccelerator) -> None:
    """The first device moves 1 MB/s after 1 ms, the second has 2 ms of latency and no limit of bandwidth."""
    first, second = accelerator.devices
    accelerator.configure(0, bandwidth_bytes_per_s=1e6, latency_s=0.001)
    accelerator.configure(1, latency_s=0.002)
    x = torch.ones(2000, dtype=torch.uint8).to(first)
    assert accelerator.stats(0).waited_s == pytest.approx(0.001 + 0.002)
    x[:1000].to(second)
    assert accelerator.stats(0).waited_s == pytest.approx(0.003 + 0.001 + 0.001)
    assert accelerator.stats(1).waited_s == pytest.approx(0.002)
    x[0].item()
    assert accelerator.stats(0).waited_s == pytest.approx(0.005 + 0.001 + 1e-6)


def test_a_slow_device_waits_in_proportion_to_its_work(accelerator: EmulatedAccelerator, index: int) -> None:
    x = torch.randn(64, 64, device=accelerator.devices[index])
    accelerator.reset()
    x @ x
    assert accelerator.stats(index).waited_s == 0
    accelerator.configure(index, slowdown=2.0)
    x @ x
    once = accelerator.stats(index).waited_s
    assert once > 0
    x @ x
    assert accelerator.stats(index).waited_s > once


def test_limits_that_are_not_named_go_back_to_their_defaults(accelerator: EmulatedAccelerator) -> None:
    accelerator.configure(0, cap_bytes=0, launch_s=0.5, latency_s=0.5, missing_dtypes=[torch.float32])
    accelerator.configure(0, slowdown=1.5)
    accelerator.configure(0)
    torch.ones(4, device=accelerator.devices[0]).cpu()
    assert accelerator.stats(0).waited_s == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"cap_bytes": -1}, "cap_bytes must be a finite number >= 0, got -1"),
        ({"slowdown": 0.5}, "slowdown must be a finite number >= 1, got 0.5"),
        ({"slowdown": float("nan")}, "slowdown must be a finite number >= 1, got nan"),
        ({"launch_s": -1.0}, "launch_s must be a finite number >= 0, got -1.0"),
        ({"latency_s": float("inf")}, "latency_s must be a finite number >= 0, got inf"),
        ({"bandwidth_bytes_per_s": 0}, "bandwidth_bytes_per_s must be a finite number > 0, got 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(
    accelerator: EmulatedAccelerator, limits: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        accelerator.configure(0, **limits)


def test_a_device_that_does_not_exist_is_named_with_those_that_do(accelerator: EmulatedAccelerator) -> None:
    for attempt in (accelerator.configure, accelerator.stats, accelerator.reset):
        with pytest.raises(IndexError, match=r"^there is no device 2; the emulated devices are dev:0, dev:1$"):
            attempt(2)
        with pytest.raises(IndexError, match=r"^there is no device -1; the emulated devices are dev:0, dev:1$"):
            attempt(-1)
