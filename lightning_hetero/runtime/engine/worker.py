"""What works for a device: its own thread, or that of the lane which needs the result."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

from lightning_hetero.runtime.emulate import METER
from lightning_hetero.runtime.engine.faults import annotated
from lightning_hetero.runtime.engine.record import Record, Recorder
from lightning_hetero.runtime.engine.turns import MayBegin, Turns
from lightning_hetero.runtime.frames import HERE
from lightning_hetero.schedule import Op

_WEIGHT = 1 / 16  # of the last task in the mean of all
LONG_S = 1e-3  # from here on, a lane runs a task only if it does not have to wait for the device
Carried = Callable[[Callable[[], Any]], Callable[[], Any]]
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
        self.keep(result, error)
        self.release()

    def keep(self, result: Any, error: BaseException | None) -> None:
        """The first half of `set`."""
        self._result, self._error = result, error

    def release(self) -> None:
        """The second half of `set`: from now on, nobody waits."""
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
    """Work for a device.

    Attributes:
        op: "F" for a forward, "B" for a backward.
        unit: Name of the unit, for records and messages.
        stage: Index of its stage.
        lane: Its micro-batch.
        run: The work.
        ended: Called when it has ended without an error, before anything else begins on the device.
    """

    op: Op
    unit: str
    stage: int
    lane: int
    run: Callable[[], Any]
    ended: Callable[[], None] | None = None


class Worker(threading.Thread):
    """A device at work: one task at a time, in the order of their priority.

    Tasks run in this thread, or in that of the lane that needs the result. The latter spares two changes of thread for
    each task, which cost more than a small module; but the thread of an accelerator has a device of its own, and that
    of a CPU of many threads a team of them, which lanes lack. And this thread goes from one long task to the next at
    once, while a lane that waits for its turn has to wake first.

    Args:
        device: Name of the device in the plan.
        torch_device: Where its tensors live.
        threads: Intra-op threads of its operations on the CPU.
        recorder: Where to note what ran.

    Attributes:
        busy_with: Op, unit and micro-batch of the task that runs now.
        task_s: Seconds of a task, the mean of the last ones. (On an accelerator, of launching it.)
        busy_s: Seconds of all tasks, as far as nobody has taken something off.
    """

    def __init__(self, device: str, torch_device: torch.device, threads: int, recorder: Recorder) -> None:
        self._thread_name = f"hetero-worker-{device}"
        super().__init__(name=self._thread_name, daemon=True)
        self.device = device
        self.torch_device = torch_device
        self._needs_no_thread = torch_device.type == "cpu" and threads == 1
        self._threads = threads
        self._recorder = recorder
        self._turns = Turns()
        self._begun: queue.SimpleQueue[tuple[Task, Future] | None] = queue.SimpleQueue()  # None: stop
        self._ready = threading.Event()
        self.busy_with: tuple[str, str, int] | None = None
        self.task_s = 0.0
        self.busy_s = 0.0

    def start(self) -> None:
        """Start the thread, and wait until it is set up."""
        super().start()
        self._ready.wait()

    @property
    def takes_help(self) -> bool:
        """Whether lanes may run its tasks in their own threads; not under a profiler, where each device has its row."""
        return self._needs_no_thread and not profiler._is_profiler_enabled

    def submit(self, place: int, call: int, task: Task, may_begin: MayBegin | None = None) -> Future:
        """Queue a task for the thread.

        Args:
            place: Of the tasks that are there, the lowest goes first; those of one place in the order of calls, and
                then of lanes.
            call: Number of the call that it belongs to.
            task: The task.
            may_begin: Whether it has what it waits for; see `look_again`.

        Returns:
            Where its result or exception goes.
        """
        future = Future()
        self._turns.queue(place, call, task.lane, partial(self._begun.put, (task, future)), may_begin)
        return future

    def help(
        self, place: int, call: int, task: Task, may_begin: MayBegin | None = None, carried: Carried | None = None
    ) -> Any:
        """Run a task in the thread of a lane, when it is its turn; see `submit`.

        A long one that has to wait is left to the thread of the device.

        Args:
            place: See `submit`.
            call: See `submit`.
            task: The task.
            may_begin: See `submit`.
            carried: Makes of the work what does the same in another thread; None if it does as it is.

        Raises:
            BaseException: What the task raised.
        """
        if HERE.at_work:  # autograd came from the middle of one task to another one: what is held, nobody may wait for
            return task.run()
        if self.task_s < LONG_S:
            self._turns.take(place, call, task.lane, may_begin)
        elif not self._turns.take_now(place, call, task.lane, may_begin):
            if carried is not None:
                task = task._replace(run=carried(task.run))
            return self.submit(place, call, task, may_begin).get()
        # Meanwhile this thread is at work for the device: code of units runs where it is, calls of units do not leave
        # it, and its random numbers are arranged, see `frames.random_numbers_arranged`. No context manager, and the
        # name past its property, which from Python 3.14 on tells the system too: every task does this.
        thread = HERE.thread
        name, thread._name = thread._name, self._thread_name
        HERE.at_work = True
        try:
            result = self._run_one(task)
            if task.ended is not None:
                task.ended()
            return result
        finally:
            HERE.at_work = False
            thread._name = name
            self._turns.pass_on()

    def look_again(self) -> None:
        """See whether a task may begin now, because of something that happened elsewhere."""
        self._turns.look_again()

    def expect(self, place: int, call: int, lane: int, until_s: float) -> None:
        """See `Turns.expect`."""
        self._turns.expect(place, call, lane, until_s)

    def expect_no_more(self, call: int, lane: int) -> None:
        """See `Turns.expect_no_more`."""
        self._turns.expect_no_more(call, lane)

    def stop(self) -> None:
        """End the thread once its tasks are done; `join` waits for it."""
        self._begun.put(None)

    def run(self) -> None:
        """What the thread does."""
        HERE.at_work = True
        torch.set_num_threads(self._threads)
        _enter_device(self.torch_device)
        METER.defer()
        self._ready.set()
        stopping = False
        while not (stopping and self._begun.empty()):
            begun = self._begun.get()
            if begun is None:
                stopping = True
                continue
            task, future = begun
            result: Any = None
            error: BaseException | None = None
            try:
                result = self._run_one(task)
                if task.ended is not None:
                    task.ended()
            except BaseException as raised:
                error = raised
            self._turns.pass_on()
            future.keep(result, error)
            del begun, task, result, error  # whoever waits goes on while this thread is still here, and owns them alone
            future.release()
            del future

    def _run_one(self, task: Task) -> Any:
        op, unit, _, lane, run, _ = task
        self.busy_with = (op, unit, lane)
        HERE.micro_batch = lane
        records = self._recorder.records
        start_s = perf_counter()
        try:
            return _labelled(task) if profiler._is_profiler_enabled else run()
        except BaseException as raised:
            annotated(raised, f"{_WORDS[op]} of {unit} on {self.device}")
            raise
        finally:
            if METER.debt_s:
                METER.pay()
            if records is not None:
                _finish(self.torch_device)
                records.append(Record(self.device, unit, op, lane, start_s, perf_counter()))
            taken_s = perf_counter() - start_s
            self.busy_s += taken_s
            self.task_s += _WEIGHT * (taken_s - self.task_s) if self.task_s else taken_s
            self.busy_with = None


def _labelled(task: Task) -> Any:
    """Run a task under a name that profilers of all threads show, such as `hetero/stage1/F3`, with its unit."""
    with profiler.record_function(f"hetero/stage{task.stage}/{task.op}{task.lane}", task.unit):
        return task.run()


def _finish(device: torch.device) -> None:
    """Wait until a device has done what was launched, so that a record has its time and not that of launching."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _enter_device(device: torch.device) -> None:
    """Make `device` the current one of this thread, as user code on one accelerator would have it."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and device.index is not None and hasattr(module, "set_device"):
        module.set_device(device.index)
        if device.type == "cuda":  # makes its context that of this thread, which cuBLAS asks for
            module.synchronize(device)
