"""What a device counts: bytes in use, bytes that travelled, kernels."""

from __future__ import annotations

import torch

from lightning_hetero.testing import DeviceStats, EmulatedAccelerator


def used(accelerator: EmulatedAccelerator, index: int) -> int:
    return accelerator.stats(index).used_bytes


def test_memory_is_in_use_for_as_long_as_a_tensor_needs_it(accelerator: EmulatedAccelerator, index: int) -> None:
    before = used(accelerator, index)
    tensor = torch.empty(100, dtype=torch.float64, device=accelerator.devices[index])
    assert used(accelerator, index) - before == 800
    view = tensor[:10]
    del tensor
    assert used(accelerator, index) - before == 800  # the view keeps all of it
    del view
    assert used(accelerator, index) == before


def test_results_of_kernels_count_and_so_do_gradients(accelerator: EmulatedAccelerator, index: int) -> None:
    before = used(accelerator, index)
    x = torch.ones(50, device=accelerator.devices[index], requires_grad=True)
    y = x * 2
    assert used(accelerator, index) - before == 400
    y.sum().backward()
    assert used(accelerator, index) - before == 600  # x, y, and the gradient of x
    del x, y
    assert used(accelerator, index) == before


def test_views_and_changes_in_place_take_no_memory(accelerator: EmulatedAccelerator, index: int) -> None:
    x = torch.ones(4, 5, device=accelerator.devices[index])
    accelerator.reset(index)
    for view in (x.t(), x[1:], x.view(20), x.detach(), x.expand(2, 4, 5), x.unsqueeze(0)):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    x.add_(1).mul_(2)
    stats = accelerator.stats(index)
    assert stats.allocations == 0
    assert stats.peak_bytes == stats.used_bytes
    assert stats.ops == 2  # add_ and mul_


def test_the_peak_is_the_most_that_was_in_use_at_once(accelerator: EmulatedAccelerator, index: int) -> None:
    device = accelerator.devices[index]
    start = used(accelerator, index)
    kept = torch.empty(100, dtype=torch.uint8, device=device)
    for size in (500, 300):
        torch.empty(size, dtype=torch.uint8, device=device)
    assert accelerator.stats(index).peak_bytes - start == 600
    accelerator.reset(index)
    assert accelerator.stats(index).peak_bytes == used(accelerator, index) == start + kept.nbytes
    torch.empty(50, dtype=torch.uint8, device=device)
    assert accelerator.stats(index).peak_bytes - start == 150


def test_transfers_are_counted_at_the_device_that_takes_part(accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices
    x = torch.ones(10, dtype=torch.float64).to(first)  # 80 bytes to the first
    y = x[:5].to(second)  # 40 bytes from the first to the second
    y.cpu()  # 40 bytes from the second
    y.sum().item()  # 8 bytes from the second
    assert [(stats.h2d_bytes, stats.d2h_bytes, stats.d2d_bytes) for stats in map(accelerator.stats, range(2))] == [
        (80, 0, 40),
        (0, 48, 0),
    ]


def test_what_travels_is_what_the_source_holds(accelerator: EmulatedAccelerator) -> None:
    target = torch.empty(100, 10, dtype=torch.float64, device=accelerator.devices[0])
    target.copy_(torch.ones(10, dtype=torch.float32))
    assert accelerator.stats(0).h2d_bytes == 40


def test_a_copy_on_one_device_is_no_transfer(accelerator: EmulatedAccelerator, index: int) -> None:
    x = torch.ones(10, device=accelerator.devices[index])
    accelerator.reset()
    x.clone()
    x.to(torch.float64)
    stats = accelerator.stats(index)
    assert (stats.h2d_bytes, stats.d2h_bytes, stats.d2d_bytes, stats.ops) == (0, 0, 0, 2)


def test_each_operator_is_one_kernel(accelerator: EmulatedAccelerator, index: int) -> None:
    x = torch.ones(3, 3, device=accelerator.devices[index])
    accelerator.reset()
    (x @ x).add_(1).relu()
    torch.softmax(x, 0)
    torch.nn.functional.layer_norm(x, (3,))
    assert accelerator.stats(index).ops == 5
    assert accelerator.stats(1 - index).ops == 0


def test_reset_forgets_all_but_the_memory_in_use(accelerator: EmulatedAccelerator) -> None:
    start = used(accelerator, 0)
    kept = torch.ones(5).to(accelerator.devices[0]) + 1
    assert accelerator.stats(0).h2d_bytes == 20
    accelerator.reset(0)
    now = start + kept.nbytes
    assert accelerator.stats(0) == DeviceStats(
        used_bytes=now,
        peak_bytes=now,
        h2d_bytes=0,
        d2h_bytes=0,
        d2d_bytes=0,
        ops=0,
        ooms=0,
        allocations=0,
        waited_s=0.0,
    )


def test_nothing_counts_as_nothing(accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    before = accelerator.stats(0)
    torch.empty(0, device=accelerator.devices[0])
    assert accelerator.stats(0) == before


def test_the_device_module_tells_the_same_numbers(accelerator: EmulatedAccelerator, index: int) -> None:
    module = torch.get_device_module(accelerator.name)
    kept = torch.empty(1000, dtype=torch.uint8, device=accelerator.devices[index])
    torch.empty(500, dtype=torch.uint8, device=kept.device)
    stats = accelerator.stats(index)
    assert module.memory_allocated(index) == module.memory_reserved(index) == stats.used_bytes >= 1000
    assert module.max_memory_allocated(index) == module.max_memory_reserved(index) == stats.peak_bytes
    assert stats.peak_bytes >= stats.used_bytes + 500
    module.reset_peak_memory_stats(index)
    assert module.max_memory_allocated(index) == stats.used_bytes


def test_the_stages_of_a_model_send_their_outputs_and_gradients_and_no_more(accelerator: EmulatedAccelerator) -> None:
    """Activations of 6 x 4 float32, 96 bytes, cross forwards; the gradient, of the same size, crosses back."""
    first, second = accelerator.devices
    one, two = torch.nn.Linear(3, 4).to(first), torch.nn.Linear(4, 2).to(second)
    x = torch.randn(6, 3).to(first)
    accelerator.reset()
    two(one(x).to(second)).sum().backward()
    assert (accelerator.stats(0).d2d_bytes, accelerator.stats(1).d2d_bytes) == (96, 96)
    assert {accelerator.stats(i).h2d_bytes + accelerator.stats(i).d2h_bytes for i in range(2)} == {0}
