"""One step as a sequence of events: actions end, tensors arrive, and free devices ask their queues what next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

from lightning_hetero.schedule import TRANSFER, Action, Op, Pipeline, Schedule, Span, Timeline, WorkQueue, bounds
from lightning_hetero.simulate.cost import StageCost


class Slot(NamedTuple):
    """A `Span` that nobody has checked: predictions are made by the thousand, and timelines looked at one by one."""

    device: str
    op: str
    start_s: float
    duration_s: float
    stage: int | None
    micro_batch: int | None


def as_timeline(slots: Iterable[Slot], devices: tuple[str, ...]) -> Timeline:
    """The slots as checked spans."""
    return Timeline(tuple(Span(**slot._asdict()) for slot in slots), devices)


def simulate(
    stages: Sequence[StageCost],
    schedule: Schedule,
    micro_batches: int,
    *,
    ops: tuple[Op, ...] | None = None,
    overlap: bool = True,
    costs_of: Callable[[int], Sequence[StageCost]] | None = None,
) -> Timeline:
    """Predict what every device does when, in one step without the optimizer.

    Devices take their actions from the same `WorkQueue` as the workers of the runtime. A device does one thing
    at a time. Transfers appear in the timeline on the device that receives.

    Args:
        stages: From the first to the last.
        schedule: The rule.
        micro_batches: How many make up a batch.
        ops: What stages do, see `Pipeline`. None: forward and backward, which is split if the schedule is for that.
        overlap: Whether transfers run beside the work of both devices, one at a time from one device to another.
            If not, the receiving device copies its input itself, just before it works on it.
        costs_of: The stages as they cost for a micro-batch, by its index; None: all cost what `stages` say.

    Raises:
        ScheduleError: There are no stages or micro-batches, or the schedule would get stuck, see `bounds`.

    Example:
        >>> from lightning_hetero.schedule import OneFOneB, draw
        >>> from lightning_hetero.simulate import StageCost, simulate
        >>> stages = [StageCost(device=name, forward_s=1, backward_s=2) for name in ("cuda:0", "cuda:1")]
        >>> print(draw(simulate(stages, OneFOneB(), micro_batches=3), width=36))
        cuda:0  F0─F1─F2─···B0────···B1────···B2────   75 %
        cuda:1  ···F0─B0────F1─B1────F2─B2────······   75 %
        12 s, bubble 25 %
    """
    slots = simulate_slots(stages, schedule, micro_batches, ops=ops, overlap=overlap, costs_of=costs_of)
    return as_timeline(slots, tuple(dict.fromkeys(stage.device for stage in stages)))


def simulate_slots(
    stages: Sequence[StageCost],
    schedule: Schedule,
    micro_batches: int,
    *,
    ops: tuple[Op, ...] | None = None,
    overlap: bool = True,
    costs_of: Callable[[int], Sequence[StageCost]] | None = None,
) -> list[Slot]:
    """What `simulate` puts into its timeline, in the order in which it begins."""
    usual: tuple[Op, ...] = ("F", "I", "W") if schedule.splits_backward else ("F", "B")
    return _Step(stages, schedule, micro_batches, ops or usual, overlap, costs_of).run()


class _Step:
    """The state of a simulation."""

    def __init__(
        self,
        stages: Sequence[StageCost],
        schedule: Schedule,
        micro_batches: int,
        ops: tuple[Op, ...],
        overlap: bool,
        costs_of: Callable[[int], Sequence[StageCost]] | None,
    ) -> None:
        self.stages = stages
        self.costs_of = costs_of or (lambda _: stages)
        self.overlap = overlap
        self.names = tuple(dict.fromkeys(stage.device for stage in stages))
        device_of = tuple(self.names.index(stage.device) for stage in stages)
        self.pipeline = Pipeline(device_of=device_of, micro_batches=micro_batches, ops=ops)
        most = bounds(schedule, self.pipeline)
        self.queues = [WorkQueue(schedule, self.pipeline, most) for _ in self.names]
        self.idle = {*range(len(self.names))}
        self.stirred: set[int] = set()  # devices for which something changed since they were asked; others have no news
        self.link_free_s: dict[tuple[int, int], float] = {}
        self.events: list[tuple[float, int, bool, Action]] = []  # time, running number, whether the action is over
        self.numbers = count()  # events at the same time come in the order in which they were foreseen
        self.slots: list[Slot] = []

    def run(self) -> list[Slot]:
        for action in self.pipeline.starts():
            self._add(action)
        self._start_work(0.0)
        while self.events:
            now_s = self.events[0][0]
            # All that happens at one time is known before any device chooses.
            while self.events and self.events[0][0] == now_s:
                _, _, over, action = heappop(self.events)
                if over:
                    self._finish(action, now_s)
                else:
                    self._add(action)
            self._start_work(now_s)
        return self.slots

    def _start_work(self, now_s: float) -> None:
        for device in sorted(self.idle & self.stirred):
            action = self.queues[device].take()
            if action is not None:
                self.idle.remove(device)
                start_s = now_s if self.overlap else self._transfer(action, now_s)
                seconds = self.costs_of(action.micro_batch)[action.stage].seconds(action.op)
                self._record(action, action.op, start_s, seconds)
                self._foresee(start_s + seconds, action, over=True)
        self.stirred.clear()

    def _finish(self, action: Action, now_s: float) -> None:
        device = self.pipeline.device_of[action.stage]
        self.idle.add(device)
        self.stirred.add(device)
        for later in self.pipeline.unlocks(action):
            receiver = self.pipeline.device_of[later.stage]
            if receiver == device or not self.overlap:
                self._add(later)
                continue
            start_s = max(now_s, self.link_free_s.get((device, receiver), 0.0))
            end_s = self._transfer(later, start_s)
            self.link_free_s[device, receiver] = end_s
            self._foresee(end_s, later, over=False)

    def _transfer(self, action: Action, start_s: float) -> float:
        """Bring an action's input from the neighbouring stage; when it is there."""
        neighbour = action.stage - 1 if action.op == "F" else action.stage + 1
        if action.op == "W" or not 0 <= neighbour < len(self.stages):
            return start_s
        sender = self.costs_of(action.micro_batch)[neighbour]
        if sender.device == self.stages[action.stage].device:
            return start_s
        seconds = sender.send_forward_s if action.op == "F" else sender.send_backward_s
        if seconds:
            self._record(action, TRANSFER, start_s, seconds)
        return start_s + seconds

    def _add(self, action: Action) -> None:
        device = self.pipeline.device_of[action.stage]
        self.queues[device].add(action)
        self.stirred.add(device)

    def _foresee(self, time_s: float, action: Action, *, over: bool) -> None:
        heappush(self.events, (time_s, next(self.numbers), over, action))

    def _record(self, action: Action, op: str, start_s: float, duration_s: float) -> None:
        device = self.stages[action.stage].device
        self.slots.append(Slot(device, op, start_s, duration_s, action.stage, action.micro_batch))
