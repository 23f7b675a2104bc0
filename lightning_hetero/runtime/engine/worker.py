"""One thread per device, which takes the tasks that are there in the order of their priority."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.emulate import METER
from lightning_hetero.runtime.engine.faults import annotated
from lightning_hetero.runtime.engine.record import Record, Recorder

_WORDS = {"F": "forward", "B": "backward"}


class Cancelled(BaseException):
    """Another micro-batch of the same call has failed. Not an Exception: user code must not swallow it."""


class Future:
    """The result of a task, to be waited for once or more often."""

    __slots__ = ("_done", "_error", "_result")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def set(self, result: Any = None, error: BaseException | None = None) -> None:
        """Give the result, or the exception; once."""
        self._result, self._error = result, error
        self._done.release()

    def get(self, timeout_s: float = -1.0) -> Any:
        """Wait for the result.

        Args:
            timeout_s: Seconds to wait at most; -1 waits for ever.

        Raises:
            TimeoutError: The time is over.
            BaseException: What the task raised.
        """
        if not self._done.acquire(timeout=timeout_s):
            raise TimeoutError
        self._done.release()
        if self._error is not None:
            raise self._error
        return self._result


class Task(NamedTuple):
    """Work for a device, in the order in which the device takes it.

    Attributes:
        place: Of the tasks that are there, the lowest goes first.
        call: Number of the call that it belongs to.
        lane: Its micro-batch.
        arrival: Tasks that are equal so far keep their order.
        run: The work.
        future: Where the result goes.
        label: What a record calls it, and its unit.
    """

    place: int
    call: int
    lane: int
    arrival: int
    run: Callable[[], Any]
    future: Future
    label: tuple[str, str]


class Worker(threading.Thread):
    """The thread of one device.

    Args:
        device: Name of the device in the plan.
        torch_device: Where its tensors live.
        threads: Intra-op threads of its operations on the CPU.
        recorder: Where to note what ran.
    """

    def __init__(self, device: str, torch_device: torch.device, threads: int, recorder: Recorder) -> None:
        super().__init__(name=f"hetero-worker-{device}", daemon=True)
        self.device = device
        self.torch_device = torch_device
        self._threads = threads
        self._recorder = recorder
        self._arriving: queue.SimpleQueue[Task | None] = queue.SimpleQueue()  # None: stop
        self._tasks: list[Task] = []
        self._arrivals = itertools.count()
        self._stopping = False
        self._ready = threading.Event()
        self.busy_with: tuple[str, str, int] | None = None

    def start(self) -> None:
        """Start the thread, and wait until it is set up."""
        super().start()
        self._ready.wait()

    def submit(
        self, place: int, call: int, lane: int, run: Callable[[], Any], future: Future, label: tuple[str, str]
    ) -> None:
        """Queue a task.

        Args:
            place: See `Task`.
            call: Number of the call.
            lane: Index of the micro-batch.
            run: The work; its result or exception goes to `future`.
            future: See `run`.
            label: Op and unit, for records and messages.
        """
        self._arriving.put(Task(place, call, lane, next(self._arrivals), run, future, label))

    def stop(self) -> None:
        """End the thread once its tasks are done; `join` waits for it."""
        self._arriving.put(None)

    def run(self) -> None:
        """What the thread does."""
        with frames.random_numbers_arranged():
            self._work()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        _enter_device(self.torch_device)
        METER.defer()
        self._ready.set()
        while (task := self._next()) is not None:
            op, unit = task.label
            self.busy_with = (op, unit, task.lane)
            frames.begin_micro_batch(task.lane)
            records = self._recorder.records
            start_s = perf_counter() if records is not None else 0.0
            result: Any = None
            error: BaseException | None = None
            try:
                result = _labelled(task) if profiler._is_profiler_enabled else task.run()
            except BaseException as raised:
                error = annotated(raised, f"{_WORDS[op]} of {unit} on {self.device}")
            METER.pay()
            if records is not None:
                records.append(Record(self.device, unit, op, task.lane, start_s, perf_counter()))
            self.busy_with = None
            task.future.set(result, error)
            del task, result, error  # a waiting thread must not keep the last result alive

    def _next(self) -> Task | None:
        """The first of the tasks that are there; waits for one. None: there will be no more."""
        tasks, arriving = self._tasks, self._arriving
        while not (tasks and arriving.empty()):
            if self._stopping and arriving.empty():
                return None
            task = arriving.get()
            if task is None:
                self._stopping = True
            else:
                heapq.heappush(tasks, task)
        return heapq.heappop(tasks)


def _labelled(task: Task) -> Any:
    """Run a task under a name that profilers of all threads show, such as `hetero/net.0/F3`."""
    op, unit = task.label
    with profiler.record_function(f"hetero/{unit}/{op}{task.lane}"):
        return task.run()


def _enter_device(device: torch.device) -> None:
    """Make `device` the current one of this thread, as user code on one accelerator would have it."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and device.index is not None and hasattr(module, "set_device"):
        module.set_device(device.index)
