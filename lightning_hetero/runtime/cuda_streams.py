"""Streams, events and page-locked memory of CUDA, as far as copies between devices need them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """What a type of accelerator has to offer for copies that run beside its work. Streams and events are its own.

    An event has `synchronize()`, which makes this thread wait; a stream `wait_event(event)`, which makes the stream.
    """

    def current(self, device: torch.device) -> Any:
        """The stream that this thread launches work on."""

    def inward(self, device: torch.device) -> Any:
        """The stream for copies to a device."""

    def outward(self, device: torch.device) -> Any:
        """The stream for copies from a device."""

    @contextmanager
    def running(self, *streams: Any) -> Iterator[None]:
        """Within the block, these are the current streams of their devices; the device of the last is current."""

    def record(self, stream: Any) -> Any:
        """An event that comes when all that is on the stream now is done."""

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """An empty tensor in memory of the CPU that the device reads and writes by itself."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy, on the current stream."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Do not give the tensor's memory to others before all that is on the stream by its end is done."""


class CudaStreams:
    """See `Streams`."""

    def __init__(self) -> None:
        self._inward: dict[torch.device, Any] = {}
        self._outward = _PerThread()
        self._lock = threading.Lock()

    def current(self, device: torch.device) -> Any:
        """The stream that this thread launches work on: the default stream, unless user code has set another."""
        return torch.cuda.current_stream(device)

    def inward(self, device: torch.device) -> Any:
        """One for all threads: memory of one stream is of no use to another, so many streams would waste it."""
        with self._lock:
            if device not in self._inward:
                self._inward[device] = torch.cuda.Stream(device)
            return self._inward[device]

    def outward(self, device: torch.device) -> Any:
        """One for each thread: a copy that has to wait for its tensor must not hold up another."""
        streams = self._outward.streams
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        return streams[device]

    @contextmanager
    def running(self, *streams: Any) -> Iterator[None]:
        """Within the block, these are the current streams of their devices; the device of the last is current."""
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def record(self, stream: Any) -> Any:
        """An event. A thread that waits for it sleeps, and leaves its core to the CPU's own stages."""
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Memory that torch keeps for its next use: to lock a page takes longer than to copy it."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy. torch notes the stream, and does not use pinned memory again before the copy has ended."""
        target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Let torch's allocator know that another stream than that of its memory uses the tensor."""
        tensor.record_stream(stream)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.streams: dict[torch.device, Any] = {}
