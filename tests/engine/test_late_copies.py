"""Copies that end later than the call that starts them: nobody uses a value before it is there.

The emulated accelerator ends every call before it returns, so no missing wait shows on it. Here it gets streams that
are late on purpose. A copy first fills its target with nonsense; the values come some time after, in a thread of the
stream. Whoever does not wait computes with nonsense, and the result differs.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.runtime import copies
from lightning_hetero.runtime.copies import STREAMS, mark, plain_copies, send
from lightning_hetero.runtime.engine.fresh import Fresh
from lightning_hetero.runtime.meter import metering
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.cut_models import Everything, Hourglass, Twice
from lightning_hetero.testing.models import MODELS

EXACT = 1e-12  # float64; sums over micro-batches are made in another order than over the whole batch
LATE_S = 5e-4
PATIENCE_S = 20.0
CPU = torch.device("cpu")


class Event:
    """Comes when a stream gets there."""

    def __init__(self) -> None:
        self.come = threading.Event()

    def synchronize(self) -> None:
        assert self.come.wait(PATIENCE_S), "an event that nobody recorded"


class Stream:
    """A thread that does one thing after the other."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def wait_event(self, event: Event) -> None:
        self.put(event.synchronize)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Now:
    """The stream on which kernels run: every one of them ends before its call returns."""

    def put(self, job: Callable[[], None]) -> None:
        job()

    def wait_event(self, event: Event) -> None:
        event.synchronize()


class LateStreams:
    """Streams of the emulated accelerator.

    Attributes:
        copies: How many copies were started.
        kept: How many tensors were said to be in use by another stream.
    """

    def __init__(self) -> None:
        self.copies = self.kept = 0
        self._local = threading.local()
        self._streams: dict[Any, Stream] = {}
        self._lock = threading.Lock()

    def current(self, device: torch.device) -> Any:
        return Now()

    def inward(self, device: torch.device) -> Any:
        return self._stream(("in", device))

    def outward(self, device: torch.device) -> Any:
        return self._stream(("out", device, threading.get_ident()))

    @contextmanager
    def running(self, *streams: Any) -> Iterator[None]:
        self._local.streams = streams
        yield
        self._local.streams = ()

    def record(self, stream: Any) -> Event:
        event = Event()
        stream.put(event.come.set)
        return event

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu")

    def copy(self, target: Tensor, source: Tensor) -> None:
        def late() -> None:
            time.sleep(LATE_S)
            target.data.copy_(source.data)

        self.copies += 1
        target.data.fill_(7e6 if target.is_floating_point() or target.is_complex() else 1)
        first, last = self._local.streams[0], self._local.streams[-1]
        first.put(late)
        if last is not first:  # between two devices the stream of the target waits, as torch has it
            last.wait_event(self.record(first))

    def keep(self, tensor: Tensor, stream: Any) -> None:
        assert tensor.device.type != "cpu"
        self.kept += 1

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _stream(self, key: Any) -> Stream:
        with self._lock:
            return self._streams.setdefault(key, Stream()) if key not in self._streams else self._streams[key]


@pytest.fixture
def late(accelerator: EmulatedAccelerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateStreams]:
    """The emulated accelerator with late streams; small copies are late too."""
    streams = LateStreams()
    monkeypatch.setitem(STREAMS, accelerator.name, streams)
    monkeypatch.setattr(copies, "PAGEABLE_BYTES", 0)
    monkeypatch.setattr(copies, "CHUNK_BYTES", 64)
    yield streams
    streams.close()


@pytest.fixture(params=range(3), ids=["cpu-first", "cpu-second", "cpu-last"])
def devices(request: pytest.FixtureRequest, accelerator: EmulatedAccelerator) -> str:
    """The CPU and two devices; the first is the root."""
    names = list(accelerator.devices[:2])
    names.insert(request.param, "cpu")
    return ",".join(names)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize(
    ("name", "rematerialize"),
    [*((name, False) for name in MODELS if name != "in_place_residual"), ("mlp", True), ("recurrent", True)],
)
def test_models_in_micro_batches(name: str, rematerialize: bool, pair: Any, late: LateStreams) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    both = pair(make().double(), rematerialize=rematerialize)
    x = data(10, generator())
    both.step(lambda model: model(x).pow(2).mean())
    assert both.difference < EXACT
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(both.model(x).cpu(), both.alone(x), rtol=0, atol=EXACT)
    assert both.calls > 0
    assert late.copies > 20
    assert late.kept > 0


@pytest.mark.parametrize("model", [Hourglass, Twice])
def test_tensors_that_skip_devices(model: type[nn.Module], pair: Any, late: LateStreams) -> None:
    both = pair(model().double())
    x = torch.randn(12, 8, dtype=torch.float64)
    for _ in range(2):
        both.step(lambda model: model(x).pow(2).mean())
        assert both.difference < EXACT
    assert late.copies > 20


def test_inputs_of_all_sorts_and_their_gradients(pair: Any, late: LateStreams) -> None:
    both = pair(Everything().double())
    x, shift = torch.randn(10, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    found = []
    for model in (both.model, both.alone):
        a, b = x.clone().requires_grad_(), shift.clone().requires_grad_()
        model({"x": a, "nothing": None}, factor=0.5, shift=b * 2, flags=[])["left"].rows.pow(3).sum().backward()
        found.append((a.grad, b.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    assert both.calls == 1


def test_replicas(accelerator: EmulatedAccelerator, pair: Any, late: LateStreams) -> None:
    first = accelerator.devices[0]
    both = pair(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double(), {"": {first: 3, "cpu": 1}}, on=f"{first},cpu")
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        both.step(lambda model: model(x).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 3


def test_equal_runs_are_equal_bit_for_bit(pair: Any, late: LateStreams) -> None:
    torch.manual_seed(0)
    both = pair(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))))
    x = torch.randn(16, 8)
    found = []
    for copying in (plain_copies, contextmanager(lambda: iter([None])), plain_copies):
        with copying():
            both.model.zero_grad()
            both.model(x).pow(2).mean().backward()
            found.append([p.grad.cpu().clone() for p in both.model.parameters()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


TENSORS = {
    "plain": torch.arange(200.0),
    "float64": torch.arange(30, dtype=torch.float64).reshape(5, 6),
    "int8": torch.arange(100, dtype=torch.int8),
    "bool": torch.arange(70) % 3 == 0,
    "bfloat16": torch.arange(100, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(300.0).reshape(20, 15).t(),
    "strided": torch.arange(400.0).reshape(20, 20)[::2, 1::3],
    "expanded": torch.arange(20.0).unsqueeze(1).expand(20, 7),
    "view": torch.arange(100.0)[13:77],
    "channels_last": torch.arange(240.0).reshape(2, 3, 5, 8).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", TENSORS)
def test_copies_are_those_of_torch(name: str, accelerator: EmulatedAccelerator, late: LateStreams) -> None:
    tensor = TENSORS[name]
    first, second = map(torch.device, accelerator.devices[:2])
    for source, target in ((CPU, first), (first, CPU), (first, second)):
        there = tensor.to(source)
        (copy,) = send([there], [target]).take()
        expected = there.to(target)
        assert copy is not None
        assert (copy.device, copy.dtype, copy.stride()) == (target, tensor.dtype, expected.stride())
        assert torch.equal(copy.cpu(), tensor)
        assert torch.equal(there.cpu(), tensor)


def test_what_is_there_already_stays(accelerator: EmulatedAccelerator, late: LateStreams) -> None:
    tensor = torch.ones(3)
    kept, nothing = send([tensor, None], [CPU, torch.device(accelerator.devices[0])]).take()
    assert kept is tensor
    assert nothing is None
    assert late.copies == 0


def test_a_mark_says_when_a_tensor_was_ready(accelerator: EmulatedAccelerator, late: LateStreams) -> None:
    device = torch.device(accelerator.devices[0])
    made_at = mark(device)
    assert made_at is not None
    made_at.event.come.clear()
    arriving = send([torch.ones(3, device=device)], [CPU], made_at)
    threading.Timer(0.05, made_at.event.come.set).start()
    (copy,) = arriving.take()
    assert made_at.event.come.is_set()
    assert copy is not None
    assert copy.tolist() == [1.0, 1.0, 1.0]
    assert mark(CPU) is None


def test_bytes_are_counted_both_ways(accelerator: EmulatedAccelerator, late: LateStreams) -> None:
    device = torch.device(accelerator.devices[0])
    with metering() as meter:
        (there,) = send([torch.ones(100)], [device]).take()
        send([there], [CPU]).take()
    assert meter.moved_bytes == 800


def test_what_was_touched_is_not_fresh(accelerator: EmulatedAccelerator, late: LateStreams) -> None:
    made_at = mark(torch.device(accelerator.devices[0]))
    assert made_at is not None
    first, second = torch.ones(3), torch.ones(3)
    fresh = Fresh(made_at, [first, second])
    assert fresh.ready([first, second]) is made_at
    assert fresh.ready([second]) is made_at
    assert fresh.ready([first.view(3)]) is None
    assert fresh.ready([first, torch.ones(3)]) is None
    first.add_(1)
    assert fresh.ready([first]) is None
    assert fresh.ready([second]) is made_at


def test_what_is_copied_to_another_accelerator_is_not_let_go_before_its_own_stream_waits(
    accelerator: EmulatedAccelerator, late: LateStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd adds to a gradient in place as soon as nobody else has it, on the stream that it was made on."""
    first, second = map(torch.device, accelerator.devices[:2])
    tensor = torch.ones(3, device=first)
    seen: list[tuple[torch.device, bool]] = []

    class Asked(Now):
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_event(self, event: Event) -> None:
            seen.append((self.device, alive() is not None))
            super().wait_event(event)

    monkeypatch.setattr(late, "current", Asked)
    alive = weakref.ref(tensor)
    arriving = send([tensor], [second])
    del tensor
    seen.clear()
    arriving.take()
    assert seen == [(second, True), (first, True)]
    for stream in list(late._streams.values()):  # the fake has the tensor until it has copied it
        stream.close()
    late._streams.clear()
    assert alive() is None
