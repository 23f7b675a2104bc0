"""What a worker asks "what next?": the actions whose inputs have arrived, in the order of the schedule."""

from __future__ import annotations

from collections import Counter, defaultdict

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import Schedule, bounds


class WorkQueue:
    """The ready actions of one device, for one run through a pipeline. Workers and the simulator ask the same object.

    Whoever owns the queue adds an action when its inputs are on the device and takes the next one when the
    device is free, so a taken action is over by the time of the next `take`. The queue has no lock and no clock.

    Two promises hold in whatever order and however late actions arrive:

    - Each stage does its forwards in order of micro-batches, and its backwards too. So sums of gradients are
      added up in the same order in every run, bit for bit, though stages that share a device may change places.
    - Workers never wait for each other in a circle, as long as the end of each action adds what it
      `Pipeline.unlocks`: nothing holds back the lowest micro-batch that is not through, wherever it is.

    Args:
        schedule: The rule.
        pipeline: The stages, also those of other devices.
        held: What `bounds` says of the two, where it was asked already.

    Raises:
        ScheduleError: The rule would get stuck, see `bounds`.
    """

    def __init__(self, schedule: Schedule, pipeline: Pipeline, held: tuple[int, ...] | None = None) -> None:
        self._pipeline = pipeline
        self._schedule = schedule
        self._bounds = bounds(schedule, pipeline) if held is None else held
        self._loss_needs_all = schedule.all_forwards_first and "F" in pipeline.ops
        self._ready: dict[Action, int] = {}  # with their priorities
        self._skipped: set[Action] = set()
        self._next: Counter[tuple[int, str]] = Counter()  # the micro-batch whose turn it is, by stage and op
        self._held: defaultdict[int, set[int]] = defaultdict(set)  # micro-batches, by stage

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, action: Action) -> None:
        """Say that the inputs of an action are there.

        Raises:
            ScheduleError: The action was added or skipped before, or the pipeline has no such action.
        """
        self._expect(action)
        self._ready[action] = self._schedule.priority(action, self._pipeline)

    def skip(self, action: Action) -> None:
        """Say that an action will never come, since control flow or autograd passes its stage by.

        Without it the micro-batches behind would wait for their turn for ever. It is early enough to say it when
        the micro-batch is through with its forward, or with its backward.

        Raises:
            ScheduleError: The action was added or skipped before, or the pipeline has no such action.
        """
        self._expect(action)
        self._skipped.add(action)
        self._move_on(action)

    def take(self) -> Action | None:
        """The action to run now. None: nothing is there, or what is there has to wait for actions yet to come."""
        action = min(filter(self._may_run, self._ready), key=self._turn, default=None)
        if action is None:
            return None
        del self._ready[action]
        self._next[action.stage, action.op] += 1
        if action.op == "F":
            self._held[action.stage].add(action.micro_batch)
        self._move_on(action)
        return action

    def _turn(self, action: Action) -> tuple[int, int, str, int]:
        """For sorting: the priority, and a fixed order of actions that have the same."""
        return self._ready[action], action.stage, action.op, action.micro_batch

    def _may_run(self, action: Action) -> bool:
        stage = action.stage
        if action.micro_batch != self._next[stage, action.op]:
            return False
        if action.op == "F":
            return len(self._held[stage]) < self._bounds[stage]
        return not self._loss_needs_all or self._next[stage, "F"] == self._pipeline.micro_batches

    def _move_on(self, action: Action) -> None:
        if action.op == self._pipeline.ops[-1]:
            self._held[action.stage].discard(action.micro_batch)
        if not self._skipped:
            return
        turn = (action.stage, action.op)
        while Action(*turn, self._next[turn]) in self._skipped:
            self._next[turn] += 1

    def _expect(self, action: Action) -> None:
        if action not in self._pipeline:
            raise ScheduleError(f"{action} is no action of {self._pipeline}; make a queue for each run of a pipeline")
        gone = action.micro_batch < self._next[action.stage, action.op]
        if gone or action in self._ready or action in self._skipped:
            raise ScheduleError(f"{action} was added or skipped before; say it once, when its inputs arrive")
