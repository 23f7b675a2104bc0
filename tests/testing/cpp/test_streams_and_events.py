"""Streams and events exist and keep their books, though every kernel ends before its call returns."""

from __future__ import annotations

import torch

from lightning_hetero.testing import EmulatedAccelerator


def test_every_device_has_a_default_stream_and_makes_more(accelerator: EmulatedAccelerator, index: int) -> None:
    device = torch.device(accelerator.devices[index])
    default = torch.accelerator.current_stream(device)
    assert (default.device, default.stream_id) == (device, 0)
    one, other = torch.Stream(device=device), torch.Stream(device=device)
    assert {one.device, other.device} == {device}
    assert len({default.stream_id, one.stream_id, other.stream_id}) == 3


def test_a_stream_is_current_in_its_block_on_its_device(accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices
    stream = torch.Stream(device=second)
    with stream:
        assert torch.accelerator.current_device_index() == 1
        assert torch.accelerator.current_stream(second) == stream
        assert torch.accelerator.current_stream(first).stream_id == 0
        x = torch.ones(3, device="dev")
    assert str(x.device) == second
    assert torch.accelerator.current_stream(second).stream_id == 0
    assert torch.accelerator.current_device_index() == 0


def test_work_on_two_streams_is_in_order(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    side, x = torch.Stream(device=device), torch.zeros(3, device=device)
    event = torch.Event(device=device)
    with side:
        x.add_(1)
        event.record()
    event.wait(torch.accelerator.current_stream(device))
    torch.accelerator.current_stream(device).wait_stream(side)
    assert x.mul_(5).tolist() == [5.0] * 3
    assert side.query()
    assert event.query()
    event.synchronize()
    side.synchronize()
    torch.accelerator.synchronize(device)


def test_events_measure_time_in_their_order(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    start, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    start.record(torch.accelerator.current_stream(device))
    torch.ones(10, device=device)
    end.record(torch.accelerator.current_stream(device))
    assert start.elapsed_time(end) >= 0
    assert end.elapsed_time(start) <= 0


def test_backward_runs_on_the_stream_of_forward(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    x, side, seen = torch.ones(2, device=device, requires_grad=True), torch.Stream(device=device), []
    with side:
        y = x * 2
        y.register_hook(lambda _: seen.append(torch.accelerator.current_stream(device)))
    y.sum().backward()
    assert seen == [side]


def test_a_tensor_can_be_marked_as_used_by_a_stream(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    x = torch.ones(2, device=device)
    x.record_stream(torch.Stream(device=device))
    assert x.tolist() == [1.0, 1.0]
