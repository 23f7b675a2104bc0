"""Tensors of the emulated accelerator behave as those of CUDA do."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_hetero.testing import EmulatedAccelerator

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def test_a_factory_allocates_where_it_is_told(device: str) -> None:
    made = [
        torch.empty(2, 3, device=device),
        torch.empty_strided((2, 3), (3, 1), device=device),
        torch.zeros(2, 3, device=device),
        torch.full((2, 3), 7.0, device=device),
        torch.arange(6, device=device),
        torch.eye(3, device=device),
        torch.randn(2, 3, device=device),
        torch.tensor([1, 2, 3], device=device),
        torch.zeros_like(torch.ones(2), device=device),
    ]
    assert {str(tensor.device) for tensor in made} == {device}


def test_a_device_without_a_number_is_the_current_one(accelerator: EmulatedAccelerator) -> None:
    kind = accelerator.name
    assert str(torch.ones(1, device=kind).device) == accelerator.devices[0]
    with torch.get_device_module(kind).device(1):
        assert str(torch.ones(1, device=kind).device) == accelerator.devices[1]
    assert str(torch.ones(1, device=kind).device) == accelerator.devices[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_goes_there_comes_back(device: str, dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    there = values.to(device)
    assert (str(there.device), there.dtype, there.shape) == (device, dtype, values.shape)
    assert torch.equal(there.cpu(), values)


@pytest.mark.parametrize("non_blocking", [False, True])
def test_tensors_travel_between_the_devices(accelerator: EmulatedAccelerator, non_blocking: bool) -> None:
    first, second = accelerator.devices
    values = torch.randn(3, 5)
    travelled = values.to(first, non_blocking=non_blocking).to(second, non_blocking=non_blocking)
    assert str(travelled.device) == second
    assert torch.equal(travelled.to("cpu", non_blocking=non_blocking), values)


def test_a_copy_keeps_the_layout_and_can_change_the_dtype(device: str) -> None:
    values = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    there = values.to(device)
    assert there.stride() == values.stride()
    assert torch.equal(there.to("cpu", torch.float16), values.half())
    assert torch.equal(there.permute(3, 0, 2, 1).cpu(), values.permute(3, 0, 2, 1))


def test_copying_into_a_tensor_broadcasts(device: str) -> None:
    target = torch.zeros(3, 4, device=device)
    target.copy_(torch.arange(4.0))
    assert torch.equal(target.cpu(), torch.arange(4.0).expand(3, 4))
    on_host = torch.zeros(3, 4)
    on_host.copy_(target[0])
    assert torch.equal(on_host, torch.arange(4.0).expand(3, 4))


def test_operands_on_two_devices_are_refused_in_torchs_words(accelerator: EmulatedAccelerator) -> None:
    first, second = (torch.ones(2, device=device) for device in accelerator.devices)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        first + second
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        first + torch.ones(2)
    with pytest.raises(RuntimeError, match=r"at least two devices, dev:1 and cpu! \(when checking argument for"):
        torch.nn.functional.linear(second, torch.ones(3, 2))


def test_numbers_and_indices_may_stay_on_the_host(device: str) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    there = values.to(device)
    assert torch.equal((there * torch.tensor(2.0)).cpu(), values * 2)
    assert torch.equal(there[torch.tensor([2, 0])].cpu(), values[[2, 0]])
    there[torch.tensor([1])] = torch.tensor(5.0)
    assert there[1].tolist() == [5.0] * 4


@pytest.mark.parametrize("number", [3, 2.5])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_number_promotes_as_on_the_host(device: str, dtype: torch.dtype, number: float) -> None:
    values = torch.tensor([7, -4, 1]).to(dtype)
    there = values.to(device)
    for op in (torch.add, torch.mul, torch.remainder, torch.copysign, torch.pow, torch.fmod, torch.eq):
        assert_same(op(values, number), op(there, number))
        assert_same(op(values[0], number), op(there[0], number))


def assert_same(expected: torch.Tensor, found: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == expected.stride()


def test_views_share_memory_and_write_through(device: str) -> None:
    base = torch.zeros(4, 6, device=device)
    views = [base.t(), base[1:3], base.reshape(2, 2, 6), base.unsqueeze(0), base.detach(), base.unfold(0, 2, 1)]
    assert {view.untyped_storage().data_ptr() for view in views} == {base.untyped_storage().data_ptr()}
    base[1:3, ::2].add_(1.0)
    assert base.sum().item() == 6.0
    assert views[0].sum().item() == 6.0
    base.view(-1)[0] = 10.0
    assert views[4][0, 0].item() == 10.0


def test_an_out_tensor_takes_the_shape_of_the_result(device: str) -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    out = torch.empty(0, device=device)
    returned = torch.add(a.to(device), b.to(device), out=out)
    assert returned is out
    assert_same(a + b, out)
    nothing = torch.empty(0, device=device)
    torch.logical_not(torch.ones(1, 0, 3, device=device), out=nothing)
    assert nothing.shape == (1, 0, 3)


def test_resize_keeps_what_fits(device: str) -> None:
    values = torch.arange(6.0, device=device)
    values.resize_(2, 2)
    assert values.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    values.resize_(8)
    assert values[:4].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_lazily_conjugated_and_negated_tensors_copy(device: str) -> None:
    values = torch.randn(3, dtype=torch.complex128)
    assert torch.equal(values.to(device).conj().cpu(), values.conj())
    assert torch.equal(values.to(device).conj().imag.cpu(), values.conj().imag)
    assert torch.equal((values.to(device).conj() * 2).cpu(), values.conj() * 2)
    assert torch.equal(values.conj().to(device).cpu(), values.conj())


def test_the_zeros_that_autograd_makes_without_memory_are_ordinary_zeros(device: str) -> None:
    x = torch.randn(3, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.sgn(x).sum(), x)
    assert gradient.tolist() == [0.0, 0.0, 0.0]
    assert (gradient + 1).tolist() == [1.0, 1.0, 1.0]


def test_deepcopy_gives_independent_tensors_on_the_same_device(device: str) -> None:
    tensor = torch.arange(3.0, device=device)
    parameter = torch.nn.Parameter(torch.ones(2, device=device))
    twin, other = copy.deepcopy((tensor, parameter))
    tensor.add_(1)
    parameter.data.add_(1)
    assert twin.tolist() == [0.0, 1.0, 2.0]
    assert other.tolist() == [1.0, 1.0]
    assert {str(twin.device), str(other.device)} == {device}
    assert isinstance(other, torch.nn.Parameter)


def test_a_tensor_prints_its_device(device: str) -> None:
    assert repr(torch.ones(2, device=device)) == f"tensor([1., 1.], device='{device}')"


def test_a_device_that_does_not_exist_is_refused(accelerator: EmulatedAccelerator) -> None:
    for attempt in (lambda: torch.empty(2, device="dev:2"), lambda: torch.ones(2, device="dev:2")):
        with pytest.raises(RuntimeError, match="invalid device ordinal 2: there are 2 emulated devices"):
            attempt()


def test_numpy_wants_a_tensor_on_the_host(device: str) -> None:
    with pytest.raises(TypeError, match=f"can't convert {device} device type tensor to numpy"):
        torch.ones(2, device=device).numpy()


def test_sparse_results_are_refused(device: str) -> None:
    with pytest.raises(
        NotImplementedError, match=f"(?i)Could not run 'aten::_to_sparse' on {device}.*dense tensors only"
    ):
        torch.eye(3, device=device).to_sparse()


def test_a_meta_tensor_has_nothing_to_copy(device: str) -> None:
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        torch.empty(2, device="meta").to(device)
    assert torch.ones(2, device=device).to("meta").device.type == "meta"


def test_the_short_names_exist(device: str, accelerator: EmulatedAccelerator) -> None:
    index = torch.device(device).index
    tensor = torch.ones(2).dev(index)
    assert tensor.is_dev
    assert str(tensor.device) == device
    assert not torch.ones(2).is_dev
    assert str(next(torch.nn.Linear(2, 2).dev(index).parameters()).device) == device
