"""Copies to and from a CUDA device on streams of their own: the values of plain ones, and nobody too early or in vain.

Streams are made busy with kernels that only wait, for so long that whoever does not wait for them is caught, and
whoever need not wait for them is seen to be done before.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime.copies import CHUNK_BYTES, PAGEABLE_BYTES, STREAMS, mark, plain_copies, send
from lightning_hetero.testing.cut_models import Hourglass, Twice
from lightning_hetero.testing.models import MODELS

pytestmark = pytest.mark.cuda

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
LONG_CYCLES = 400_000_000  # about 0.2 s
SHORT_CYCLES = 4_000_000  # about 2 ms
LARGE = 2 * CHUNK_BYTES + 4096
PLACES = ["cuda:0,cpu", "cpu,cuda:0"]

TENSORS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: torch.randn(1000),
    "at the bound": lambda: torch.randn(PAGEABLE_BYTES // 4),
    "beyond the bound": lambda: torch.randn(PAGEABLE_BYTES // 4 + 1),
    "several chunks": lambda: torch.randn(LARGE // 4 + 3),
    "float64": lambda: torch.randn(300, 400, dtype=torch.float64),
    "float16": lambda: torch.randn(300, 400).half(),
    "bfloat16": lambda: torch.randn(300, 400).bfloat16(),
    "int8": lambda: torch.arange(200_000).to(torch.int8),
    "int64": lambda: torch.arange(200_000),
    "bool": lambda: torch.arange(200_000) % 3 == 0,
    "complex": lambda: torch.randn(200, 300, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(200, 300, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(200, 300, dtype=torch.complex64).conj().imag,
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 5),
    "transposed": lambda: torch.randn(300, 500).t(),
    "strided": lambda: torch.randn(600, 800)[::2, 1::3],
    "expanded": lambda: torch.randn(300, 1).expand(300, 200),
    "view": lambda: torch.randn(200_000)[17:150_001],
    "channels_last": lambda: torch.randn(4, 16, 32, 33).contiguous(memory_format=torch.channels_last),
    "pinned": lambda: torch.randn(200_000).pin_memory(),
    "parameter": lambda: nn.Parameter(torch.randn(300, 300)).detach(),
    "frozen parameter": lambda: nn.Parameter(torch.randn(300, 300), requires_grad=False),
}


@pytest.fixture
def devices() -> str:
    """None of the emulated accelerator, which does not share a process with CUDA."""
    return PLACES[0]


def warm(*numels: int) -> None:
    """Let torch get the memory that a test needs: to ask CUDA for memory may wait for the whole device."""
    for numel in numels:
        ups = [copied(torch.ones(numel), GPU) for _ in range(3)]
        downs = [copied(up, CPU) for up in ups]
        torch.cuda.synchronize()
        del ups, downs


def busy(stream: Any, cycles: int = LONG_CYCLES) -> None:
    """Let a stream wait."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)


def copied(tensor: Tensor, device: torch.device, made_at: Any = None) -> Tensor:
    (copy,) = send([tensor], [device], made_at).take()
    assert copy is not None
    return copy


@pytest.mark.parametrize("name", TENSORS)
def test_copies_are_those_of_torch(name: str) -> None:
    tensor = TENSORS[name]()
    for source, target in ((tensor, GPU), (tensor.to(GPU), CPU)):
        copy, expected = copied(source, target), source.to(target)
        assert (copy.device, copy.dtype) == (target, tensor.dtype)
        assert copy.stride() == expected.stride()
        assert torch.equal(copy, expected)
        assert not copy.requires_grad


def test_a_view_on_the_device_comes_down() -> None:
    there = torch.randn(700, 600, device=GPU)
    for view in (there[100:300], there.t(), there[::3, ::2], there[5], there.expand(2, 700, 600)):
        assert torch.equal(copied(view, CPU), view.cpu())


def test_a_copy_from_the_device_waits_for_the_tensor_and_for_nothing_later() -> None:
    source = torch.zeros(500_000, device=GPU)
    warm(500_000)
    for value in (1.0, 2.0):
        torch.cuda._sleep(SHORT_CYCLES * 10)
        source = source + 1
        made_at = mark(GPU)
        torch.cuda._sleep(LONG_CYCLES)
        copy = copied(source, CPU, made_at)
        assert not torch.cuda.current_stream(GPU).query(), "it waited for what was launched later"
        assert bool((copy == value).all())
    torch.cuda.synchronize()


def test_without_a_mark_a_copy_waits_for_all_that_was_launched() -> None:
    source = torch.zeros(500_000, device=GPU)
    torch.cuda._sleep(LONG_CYCLES)
    source += 1
    assert bool((copied(source, CPU) == 1).all())


def test_a_late_copy_from_the_device_is_waited_for() -> None:
    busy(STREAMS["cuda"].outward(GPU))
    assert bool((copied(torch.ones(500_000, device=GPU), CPU) == 1).all())


@pytest.mark.parametrize("numel", [500_000, LARGE // 4])
def test_a_late_copy_to_the_device_is_waited_for_by_what_uses_it(numel: int) -> None:
    warm(numel)
    float(torch.ones(numel, device=GPU).sum(dtype=torch.float64))  # the kernel is loaded, the memory there
    busy(STREAMS["cuda"].inward(GPU))
    copy = copied(torch.ones(numel), GPU)
    total = copy.sum(dtype=torch.float64)
    assert not torch.cuda.current_stream(GPU).query(), "the thread waited, and not the stream"
    assert float(total) == numel


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("numel", [100, 500_000, LARGE // 4])
def test_what_goes_up_may_change_as_soon_as_it_is_sent(numel: int, pinned: bool) -> None:
    source = torch.ones(numel, pin_memory=pinned)
    torch.cuda._sleep(SHORT_CYCLES * 10)
    arriving = send([source], [GPU])
    source.fill_(float("nan"))
    del source
    others = [torch.full((numel,), float("nan"), pin_memory=True) for _ in range(4)]  # might get the same memory
    (copy,) = arriving.take()
    assert copy is not None
    assert float(copy.sum(dtype=torch.float64)) == numel
    del others


def test_memory_is_not_used_again_too_early() -> None:
    def one(value: int) -> tuple[Any, Any]:
        torch.cuda._sleep(SHORT_CYCLES)
        there = torch.full((300_000,), float(value), device=GPU)
        down = send([there], [CPU], mark(GPU))
        up = send([torch.full((300_000,), float(value))], [GPU])
        del there
        torch.full((300_000,), -1.0, device=GPU)
        return down, up

    under_way = [(value, *one(value)) for value in range(40)]
    for value, down, up in under_way:
        for arriving in (down, up):
            (copy,) = arriving.take()
            assert bool((copy == value).all())
            del copy
            torch.full((300_000,), -2.0, device=GPU)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.cuda._sleep(SHORT_CYCLES)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        torch.cuda._sleep(SHORT_CYCLES)
        return gradients[0].clone()


class Late(nn.Module):
    """A layer whose values come late where it runs on a GPU, in both directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        def wait(x: Tensor) -> Tensor:
            return _Wait.apply(x) if x.is_cuda else x  # type: ignore[no-any-return,no-untyped-call]

        return wait(torch.tanh(self.linear(wait(x))))


class Plain(nn.Module):
    """Late layers, called by user code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Late(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x) * 2)
        return self.d(y) + self.c(y)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.pow(2).mean().backward()
    return [y.detach().cpu(), *(p.grad.cpu().clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", ["chain", "own forward"])
@pytest.mark.parametrize("width", [16, 512])
def test_late_values_are_those_of_plain_copies(width: int, kind: str, places: str, pair: Any) -> None:
    torch.manual_seed(0)
    model = Plain(width) if kind == "own forward" else nn.Sequential(*(Late(width) for _ in range(4)))
    both = pair(model, on=places)
    root = places.split(",")[0]
    x = torch.randn(256, width, device=root)
    both.model(x)  # finds out what may be cut
    with plain_copies():
        expected = results(both.model, x)
    for _ in range(5):
        for ours, theirs in zip(results(both.model, x), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert both.calls == 7


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "in_place_residual"])
def test_models_give_the_numbers_of_plain_copies(name: str, places: str, pair: Any) -> None:
    """To rounding: torch adds up gradients of some convolutions in a random order."""
    make, data = MODELS[name]
    torch.manual_seed(0)
    both = pair(make().double(), on=places)
    x = data(16, torch.Generator().manual_seed(7)).to(places.split(",")[0])
    results(both.model, x)
    with plain_copies():
        expected = results(both.model, x)
    for ours, theirs in zip(results(both.model, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    both.alone(x.cpu()).pow(2).mean().backward()
    for p, q in zip(both.model.parameters(), both.alone.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=0, atol=1e-11)
    with torch.inference_mode():
        torch.testing.assert_close(both.model(x).cpu(), both.alone(x.cpu()), rtol=0, atol=1e-11)
    assert both.calls > 0


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("model", [Hourglass, Twice])
def test_tensors_that_skip_devices(model: type[nn.Module], places: str, pair: Any) -> None:
    both = pair(model().double(), on=places)
    x = torch.randn(12, 8, dtype=torch.float64)
    for _ in range(3):
        both.step(lambda model: model(x.to(places.split(",")[0]) if model is both.model else x).pow(2).mean().cpu())
        assert both.difference < 1e-12


def test_replicas_with_unequal_shares(pair: Any) -> None:
    model = nn.Sequential(Late(64), Late(64)).double()
    both = pair(model, {"": {"cuda:0": 3, "cpu": 1}}, on="cuda:0,cpu")
    x = torch.randn(64, 64, dtype=torch.float64)
    for _ in range(3):
        both.step(lambda model: model(x.to(GPU) if model is both.model else x).pow(2).mean().cpu())
        assert both.difference < 1e-12
    assert both.calls == 3


def test_nothing_is_left_on_the_device(pair: Any) -> None:
    both = pair(nn.Sequential(*(Late(64) for _ in range(4))), on="cuda:0,cpu")
    x = torch.randn(64, 64, device=GPU)
    used = []
    for _ in range(6):
        results(both.model, x)
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated(GPU))
    assert used[2:] == used[2:3] * 4
