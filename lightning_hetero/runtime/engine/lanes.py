"""Lanes: threads in which the user's code runs, one micro-batch each."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_hetero.runtime.emulate import METER
from lightning_hetero.runtime.engine.faults import Countdown, annotated
from lightning_hetero.runtime.engine.worker import Cancelled, Worker
from lightning_hetero.runtime.frames import HERE

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.call import Call
    from lightning_hetero.runtime.engine.cut import UnitCall
    from lightning_hetero.runtime.engine.fresh import Fresh
    from lightning_hetero.runtime.engine.streams import Stream


class Lane:
    """One micro-batch on its way through a region, and its autograd graph.

    Attributes:
        index: Index of the micro-batch.
        anchor: A leaf that every cut of a lane's graph depends on. Without it autograd would leave out units whose
            inputs need no gradient. All lanes share it: nobody looks at its gradient.
        stream: Random numbers of the lane's own code; None if it draws none.
        trace: Numbers of the units that were called, in order.
        units: The calls of units that have a graph, in order.
        inputs: The inputs that need a gradient, as leaves of this lane.
        outputs: The outputs that have a graph.
        edges: Edges to the leaves that the lane's own code uses.
        leaves: These leaves.
        nodes: Inner nodes of the lane's graph.
        gradients: Gradients of `inputs`, once they are known.
        in_backward: Whether the backward of the whole lane runs.
        turned_s: When the last forward ended, by `perf_counter`; None once another task came.
        expected_by: The device that waits for that.
        given: What the lane was given, until its region begins.
        fresh: What the lane was given, or the last unit has returned.
        fresh_gradients: The gradients that its backward begins with.
        passes_on: Whether `fresh` goes straight to the next unit, without user code in between.
    """

    anchor = torch.zeros((), device="cpu", requires_grad=True)
    # Kept, so that no lane has to make it: with anomaly detection torch wants the interpreter in the middle of that,
    # and two lanes would wait for each other.
    anchor_node = get_gradient_edge(anchor).node

    def __init__(self, call: Call, index: int) -> None:
        self._call = weakref.ref(call)
        self.index = index
        self.stream: Stream | None = None
        self.trace: list[int] = []
        self.inputs: list[Tensor] = []
        self.in_backward = False
        self.turned_s: float | None = None
        self.expected_by: Worker | None = None
        self.gradients: Sequence[Tensor | None] = ()
        self.begin()

    @property
    def call(self) -> Call:
        """The call, which owns its lanes.

        The reference is weak, as is that from a call of a unit to its lane: a strong one would close a circle through
        the autograd graph, where Python's garbage collector does not look, and outputs that nobody differentiates
        would stay for ever.
        """
        call = self._call()
        assert call is not None
        return call

    def begin(self) -> None:
        """Forget what an earlier run has left."""
        self.trace = []
        self.inputs = []
        self.drop_graph()

    def drop_graph(self) -> None:
        """Let go of activations."""
        self.given: Fresh | None = None
        self.fresh: Fresh | None = None
        self.fresh_gradients: Fresh | None = None
        self.passes_on = False
        self.units: list[UnitCall] = []
        self.outputs: list[Tensor] = []
        self.edges: list[GradientEdge] = []
        self.leaves: list[Tensor] = []
        self.nodes: set[Node] = set()

    def take_given(self) -> Fresh | None:
        """What the lane was given, for the region that it was given to; None for regions inside of that."""
        given, self.given = self.given, None
        return given


class _Local(threading.local):
    lane: Lane | None = None


_LOCAL = _Local()


def current_lane() -> Lane | None:
    """The lane that this thread runs; None in threads of workers, and in user code outside of a pipelined call."""
    return _LOCAL.lane


def calling_lane() -> Lane | None:
    """The lane whose own code this thread runs; None in the code of units."""
    return None if HERE.at_work else _LOCAL.lane


class LanePool:
    """Threads that run jobs of lanes.

    Args:
        size: How many; no more micro-batches than that are on their way at once.
    """

    def __init__(self, size: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"hetero-lane-{index}", daemon=True) for index in range(size)
        ]
        self._ready = threading.Semaphore(0)
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            self._ready.acquire()

    def put(self, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise."""
        self._jobs.put(job)

    def dismiss(self) -> None:
        """Let the threads end once their jobs are done."""
        for _ in self._threads:
            self._jobs.put(None)

    def close(self, timeout_s: float) -> bool:
        """End the threads. Returns whether all of them ended in time, which they share."""
        self.dismiss()
        end_s = monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        torch.set_num_threads(1)  # more threads are the workers'
        METER.defer()  # to the end of a task
        self._ready.release()
        job: Callable[[], None] | None
        while (job := self._jobs.get()) is not None:
            job()
            del job


class Crew:
    """Runs the same work in all lanes of a call, a bounded number at once, and collects what they raise.

    Args:
        pool: The threads.
        call: The call, which is told when all lanes have to stop, and only then.
        lanes: The lanes, in order.
        work: What each of them does.
        in_flight: How many may be under way at once; each that ends starts the next.
        ended: Called when a lane has ended, and when all have to stop.

    Attributes:
        left: Counts the lanes that have not ended.
    """

    def __init__(
        self,
        pool: LanePool,
        call: Call,
        lanes: Sequence[Lane],
        work: Callable[[Lane], None],
        in_flight: int,
        ended: Callable[[], None],
    ) -> None:
        self._size = len(lanes)
        self._waiting = deque(lanes)
        self._work = work
        self._ended = ended
        self._call = call
        self._errors: dict[int, BaseException] = {}
        self.left = Countdown(len(lanes))
        for _ in range(min(in_flight, len(lanes))):
            pool.put(self._run)

    def stop(self) -> None:
        """Let all lanes stop at their next call of a unit."""
        self._call.has_failed = True
        self._ended()

    def raise_first(self, where: str) -> None:
        """Raise what the first of the failed lanes raised, with its own type and traceback; once, when all have ended.

        A thread on its way out of its last lane still holds this crew, which must not hold the call for so long.
        """
        del self._call, self._work, self._ended
        if self._errors:
            index = min(self._errors)
            error = self._errors[index]
            self._errors = {}  # an exception holds its frames, and they hold activations
            raise annotated(error, f"micro-batch {index} of {self._size} in {where}")

    def _run(self) -> None:
        """Lanes one after the other, as long as there are any: a thread that goes on wakes nobody."""
        while self._waiting:
            try:
                lane = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            _LOCAL.lane = lane
            self._run_one(lane)
            _LOCAL.lane = None
            del lane
            self._ended()
            self.left.count_down()

    def _run_one(self, lane: Lane) -> None:
        try:
            if not self._call.has_failed:
                self._work(lane)
        except Cancelled:
            pass
        except BaseException as error:
            self._errors[lane.index] = error
            self._call.has_failed = True
