"""Threads: the current device is a matter of each, and work on two devices at once is kept apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lightning_hetero.testing import EmulatedAccelerator


def in_a_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def test_each_thread_has_its_own_current_device(accelerator: EmulatedAccelerator) -> None:
    module = torch.get_device_module(accelerator.name)
    with module.device(1):
        assert in_a_thread(module.current_device) == 0
        in_a_thread(lambda: module.set_device(0))
        assert module.current_device() == 1
    assert module.current_device() == 0


def trained(device: str, steps: int = 30) -> list[Tensor]:
    """Parameters after some steps; a network that depends on nothing but the device's own seed."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 6, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(device)
    for _ in range(steps):
        (x @ w).tanh().square().mean().backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
        w.grad = None
    return [w.detach().cpu()]


def test_two_threads_train_on_two_devices_at_once(accelerator: EmulatedAccelerator) -> None:
    (expected,) = trained("cpu")
    start = threading.Barrier(2)

    def work(device: str) -> Tensor:
        start.wait(timeout=60)
        return trained(device)[0]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, accelerator.devices))
    assert [torch.equal(expected, one) for one in found] == [True, True]


def test_no_count_is_lost_between_threads(accelerator: EmulatedAccelerator) -> None:
    x = torch.ones(4, device=accelerator.devices[0])
    accelerator.reset()
    in_use = accelerator.stats(0).used_bytes
    start = threading.Barrier(4)

    def work(_: int) -> None:
        start.wait(timeout=60)
        for _ in range(100):
            (x + 1).cpu()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    stats = accelerator.stats(0)
    assert (stats.ops, stats.allocations, stats.d2h_bytes) == (400, 400, 6400)
    assert stats.used_bytes == in_use


def test_a_thread_can_pass_backward_through_both_devices(accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices

    def work() -> list[float]:
        x = torch.ones(3, device=second, requires_grad=True)
        (x * 2).to(first).sum().backward()
        assert x.grad is not None
        return x.grad.tolist()

    assert in_a_thread(work) == [2.0, 2.0, 2.0]


def test_one_graph_may_be_made_in_a_thread_and_passed_in_another(accelerator: EmulatedAccelerator) -> None:
    layer = nn.Linear(3, 2).to(accelerator.devices[1])
    x = torch.randn(4, 3)
    loss = in_a_thread(lambda: layer(x.to(accelerator.devices[1])).sum())
    assert isinstance(loss, Tensor)
    loss.backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.cpu(), x.sum(0).expand(2, 3))


def test_random_numbers_drawn_by_threads_are_all_different(accelerator: EmulatedAccelerator) -> None:
    def draw(_: int) -> list[float]:
        return torch.rand(50, dtype=torch.float64, device=accelerator.devices[0]).tolist()

    with ThreadPoolExecutor(4) as pool:
        drawn = [number for numbers in pool.map(draw, range(16)) for number in numbers]
    assert len(set(drawn)) == 800
