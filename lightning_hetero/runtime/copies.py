"""Copies between devices that hold up neither a device nor the thread that works for it.

A plain `tensor.to("cpu")` waits for all that was launched on the device so far, which may be the work of later
micro-batches, and keeps the thread that launches from going on. Here a copy runs on a stream of its own, which waits
for the work that made the tensor, and for no other. What goes up is first written to page-locked memory, where the
device fetches it by itself; what comes down is written there.

The values are those of a plain copy. Nobody gets hold of a tensor that is still being written: `send` starts copies
and returns an `Arriving`, whose `take` waits before it hands them out.

Where there are no streams (or this does not know them), a copy is a plain one, made by `take`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.runtime import meter
from lightning_hetero.runtime.cuda_streams import CudaStreams, Streams
from lightning_hetero.runtime.transfer import to_device

# CUDA takes as much out of ordinary memory at once, without a look at the device: the detour costs more than it brings.
PAGEABLE_BYTES = 64 << 10
# While the device fetches one chunk, the next is written: together they take hardly longer than the slower of the two.
CHUNK_BYTES = 4 << 20

STREAMS: dict[str, Streams] = {"cuda": CudaStreams()}
"""The types of devices with streams. `plain_copies` empties it for a while."""


class Mark(NamedTuple):
    """A moment in the work of a device: all that one thread had launched by then.

    Attributes:
        device: The device.
        event: Its event.
    """

    device: torch.device
    event: Any


def mark(device: torch.device) -> Mark | None:
    """What this thread has launched on the device by now; None if a device's work ends before its calls return."""
    streams = STREAMS.get(device.type)
    return None if streams is None else Mark(device, streams.record(streams.current(device)))


def wait_for(moment: Mark) -> None:
    """Let what this thread launches from now on, on the device of a mark, begin after that moment."""
    streams = STREAMS.get(moment.device.type)
    if streams is not None:
        streams.current(moment.device).wait_event(moment.event)


class UnderWay(NamedTuple):
    """A copy that may not be complete yet.

    Attributes:
        streams: Of the type of accelerator that makes it.
        copy: The copy.
        event: Comes when it is complete; None if it is.
        source: What it is made of, if that must neither go nor change before.
    """

    streams: Streams
    copy: Tensor
    event: Any
    source: Tensor | None


class Arriving:
    """Tensors under way to other devices.

    Args:
        tensors: The tensors, copies among them; None stays None.
        under_way: Those that cannot be used without waiting.
        to_copy: The places of those that are still where they were, and where they go.
    """

    __slots__ = ("_tensors", "_to_copy", "_under_way")

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        under_way: Sequence[UnderWay] = (),
        to_copy: Sequence[tuple[int, torch.device]] = (),
    ) -> None:
        self._tensors = tensors
        self._under_way = under_way
        self._to_copy = to_copy

    @property
    def is_under_way(self) -> bool:
        """Whether everything that moves does so by itself."""
        return not self._to_copy

    def take(self) -> Sequence[Tensor | None]:
        """The tensors, for this thread to use; to be called once.

        For those on the CPU it waits. For those on an accelerator the stream waits that this thread launches on, and
        the thread goes on.
        """
        for streams, copy, event, source in self._under_way:
            if copy.is_cpu:
                event.synchronize()
                continue
            current = streams.current(copy.device)
            if event is not None:
                current.wait_event(event)
            if source is not None:  # autograd adds to a gradient in place once nobody else has it
                streams.current(source.device).wait_event(event)
            streams.keep(copy, current)  # it comes from the memory of another stream
        self._under_way = ()
        if not self._to_copy:
            return self._tensors
        result = list(self._tensors)
        for place, device in self._to_copy:
            tensor = result[place]
            result[place] = None if tensor is None else to_device(tensor, device)
        return result


def send(tensors: Sequence[Tensor | None], devices: Sequence[torch.device], made_at: Mark | None = None) -> Arriving:
    """Start to copy tensors. They must not have an autograd graph, and must not be changed before `take`.

    Args:
        tensors: The tensors; None is passed on.
        devices: Where each of them goes. One that is there already is handed out as it is.
        made_at: When those on `made_at.device` were ready. None: at whatever this thread has launched by now.
    """
    result = list(tensors)
    under_way: list[UnderWay] = []
    to_copy: list[tuple[int, torch.device]] = []
    marks = {} if made_at is None else {made_at.device: made_at}
    for place, (tensor, device) in enumerate(zip(tensors, devices, strict=True)):
        if tensor is None or tensor.device == device:
            continue
        streams = _streams(tensor, device)
        if streams is None:
            to_copy.append((place, device))
            continue
        with torch._C.DisableTorchFunction():  # modes of user code have nothing to see here
            if tensor.is_cpu:
                started = _up(streams, tensor, device)
            else:
                if tensor.device not in marks:
                    marks[tensor.device] = Mark(tensor.device, streams.record(streams.current(tensor.device)))
                started = (_down if device.type == "cpu" else _across)(streams, tensor, device, marks[tensor.device])
        result[place] = started.copy
        under_way.append(started)
        for each in meter.running:
            each.count(started.copy)
    return Arriving(result, under_way, to_copy)


@contextmanager
def plain_copies() -> Iterator[None]:
    """Within the block, in all threads, copies are plain ones: for comparison."""
    before = dict(STREAMS)
    STREAMS.clear()
    try:
        yield
    finally:
        STREAMS.update(before)


def _streams(tensor: Tensor, device: torch.device) -> Streams | None:
    """Those of the accelerator; None for copies that torch makes better by itself."""
    kinds = {tensor.device.type, device.type} - {"cpu"}
    streams = STREAMS.get(kinds.pop()) if len(kinds) == 1 else None
    if streams is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    return None if tensor.is_quantized or tensor.is_nested or tensor.numel() == 0 else streams


def _up(streams: Streams, tensor: Tensor, device: torch.device) -> UnderWay:
    """From the CPU to the device."""
    inward = streams.inward(device)
    with streams.running(inward):
        # Nobody waits for a copy out of memory of our own. Out of that of user code, which may change it as soon as it
        # gets control back, the copy ends before this returns; it is short, and this stream has no other work.
        if tensor.nbytes <= PAGEABLE_BYTES or tensor.is_pinned():
            return UnderWay(streams, tensor.to(device), None, None)
        there = torch.empty_like(tensor, device=device)
        plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        step = max(1, CHUNK_BYTES // tensor.element_size()) if plain else 0
        sources = tensor.view(-1).split(step) if plain else [tensor]
        targets = there.view(-1).split(step) if plain else [there]
        for source, target in zip(sources, targets, strict=True):
            streams.copy(target, streams.pinned_like(source).copy_(source))
        return UnderWay(streams, there, streams.record(inward), None)


def _down(streams: Streams, tensor: Tensor, device: torch.device, ready: Mark) -> UnderWay:
    """From the device to the CPU."""
    outward = streams.outward(tensor.device)
    outward.wait_event(ready.event)
    with streams.running(outward):
        # What torch cannot copy in one piece it finishes on the CPU, without waiting for the device. So it gets one.
        whole = tensor.resolve_conj().resolve_neg()
        if not whole.is_contiguous():
            whole = whole.clone()
        here = streams.pinned_like(whole)
        streams.copy(here, whole)
        return UnderWay(streams, here, streams.record(outward), tensor)


def _across(streams: Streams, tensor: Tensor, device: torch.device, ready: Mark) -> UnderWay:
    """From one device to another of its type. torch copies on the stream of the one, and lets that of the other wait.

    On the streams that compute, each device would wait for all that the other has to do.
    """
    outward, inward = streams.outward(tensor.device), streams.inward(device)
    outward.wait_event(ready.event)
    with streams.running(outward, inward):
        there = torch.empty_like(tensor, device=device)
        streams.copy(there, tensor)
        event = streams.record(inward)
    streams.keep(tensor, outward)  # nobody on the CPU waits, so it may be let go before it is copied
    return UnderWay(streams, there, event, tensor)
