"""What calls of regions and whole steps have in common: lanes, sums of gradients, failure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_hetero.runtime.engine.lanes import Crew, Lane
from lightning_hetero.runtime.engine.leaves import OrderedSums
from lightning_hetero.runtime.engine.silence import SILENCE
from lightning_hetero.runtime.engine.state import ThreadState
from lightning_hetero.runtime.engine.worker import Cancelled, Worker
from lightning_hetero.schedule import Op
from lightning_hetero.schedule.rows import deal

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.cut import Unit
    from lightning_hetero.runtime.engine.engine import Engine


class Call:
    """Something that runs in lanes.

    Args:
        engine: Workers, lanes, generators.
        number: Workers take tasks of calls with lower numbers first.
        name: For messages.
        rows: Rows of each micro-batch; each has a lane.
        seed: Where random numbers begin; None if none are drawn.
        checks_capture: Whether to look for tensors that come into lanes by another way than inputs.

    Attributes:
        sums: Sums of the gradients of parameters.
        has_failed: Whether some lane has failed, or the call was interrupted: then all stop.
        keeps_graph: Whether there may be another backward.
        is_step: Whether forwards go on while backwards run, so that numbers are drawn for good meanwhile.
    """

    is_step = False

    def __init__(
        self, engine: Engine, *, number: int, name: str, rows: Sequence[int], seed: int | None, checks_capture: bool
    ) -> None:
        self.engine = engine
        self.number = number
        self.name = name
        self.seed = seed
        self.checks_capture = checks_capture
        self.generators = engine.generators
        self.device_types = engine.device_types
        self.sums = OrderedSums()
        self.keeps_graph = False
        self._state = ThreadState(engine.device_types)
        self._rows = rows
        self._dealt: dict[int, Sequence[int]] = {}
        self._lanes = [Lane(self, index) for index in range(len(rows))]
        self.has_failed = False
        self._crew: Crew | None = None
        self._muted: list[Tensor] = []

    def check(self) -> None:
        """Stop what belongs to a call that has failed.

        Raises:
            Cancelled: Some lane of the call has failed.
        """
        if self.has_failed:
            raise Cancelled

    def carried(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work of a unit, as this thread would do it, for another thread to do."""
        return partial(ThreadState(self.device_types).run, work)

    def in_order(self, lane: Lane, unit: Unit) -> AbstractContextManager[None] | None:
        """Within the block, lower lanes are done with the unit; None if their order does not matter."""
        return None

    def passing(self, lane: Lane, key: Hashable, name: str) -> AbstractContextManager[None]:
        """Within the block, lower lanes are done with `key`, which is called `name`, if their order matters."""
        return nullcontext()

    def place(self, op: Op, unit: Unit, lane: Lane) -> int:
        """Place of a task on its device, where the lowest goes first. Backwards do here: they free memory."""
        return 0 if op == "B" else 1

    def arrives(self, lane: Lane, worker: Worker) -> None:
        """A lane comes with its next task."""

    def when_ended(self, unit: Unit, number: int, lane: Lane) -> Callable[[], None] | None:
        """What is to be done as soon as a forward has ended; `number` is the index of the call in its lane."""
        return None

    def turn_of(self, lane: Lane, unit: Unit) -> Callable[[], bool] | None:
        """Says whether the backward of a unit may begin for a lane; None if it may.

        Gradients of parameters that come before those of lower lanes would wait, and take memory meanwhile.
        """
        sums, number, index = self.sums, unit.number, lane.index
        if not index or sums.is_turn_of(number, index):
            return None

        def may_begin() -> bool:
            return self.has_failed or sums.is_turn_of(number, index)

        return may_begin

    def replica(self, lane: Lane, unit: Unit) -> Unit:
        """The replica of a unit that a lane uses; the unit itself if it has none."""
        if not unit.replicas:
            return unit
        dealt = self._dealt.get(unit.number)
        if dealt is None:
            self._dealt[unit.number] = dealt = deal(self._rows, unit.shares if self._may_share(unit) else (1.0,))
        index = dealt[lane.index]
        return unit.replicas[index - 1] if index else unit

    def _may_share(self, unit: Unit) -> bool:
        """Whether several devices may take part in a unit's work in this call."""
        return True

    def _start(self, work: Callable[[Lane], None], in_flight: int) -> None:
        threads = self.engine.threads
        self.has_failed = False
        self._crew = Crew(threads.pool, self, self._lanes, work, in_flight, ended=threads.look_again)

    def _finish(self) -> None:
        """Wait for all lanes; raise what the first of those that failed raised."""
        crew = self._crew
        if crew is None:
            raise RuntimeError(_given_up(self.name))
        try:
            self.engine.threads.wait(crew.left, self.name)
        except BaseException:
            crew.stop()  # an interrupt: lanes stop at their next call of a unit
            self.engine.threads.drain(crew.left)
            raise
        self._crew = None  # it holds what its lanes do, which holds this call
        crew.raise_first(self.name)
        if self.has_failed:
            raise RuntimeError(_given_up(self.name))

    def _stop(self) -> None:
        """End lanes for which nobody waits."""
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.stop()
            self.engine.threads.drain(crew.left)

    def _mute(self, leaves: Iterable[Tensor]) -> None:
        """Silence hooks on leaves while lanes run: a backward that asks for a leaf would call them in every lane."""
        self._muted = list(leaves)
        SILENCE.begin(self._muted)

    def _unmute(self) -> None:
        muted, self._muted = self._muted, []
        SILENCE.end(muted)


def _given_up(name: str) -> str:
    return (
        f"the backward of {name} was given up, because its forward was called again before it had ended. Call backward "
        "in the thread that called forward, and do not start another step in between."
    )
