"""What a worker asks "what next?": the actions whose inputs have arrived, in the order of the schedule."""

from __future__ import annotations

from collections import Counter

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import Schedule, bounds


class WorkQueue:
    """The ready actions of one device. The runtime's workers and the simulator ask the same object.

    Whoever owns the queue adds an action when its inputs are on the device and takes the next one when the
    device is free, so a taken action is over by the time of the next `take`. The queue has no lock and no clock.

    Some worker always has something to do, as long as each queue gets what `Pipeline.unlocks`: the micro-batch
    that has come furthest waits for nobody, for a stage that it has yet to reach holds none.

    Args:
        schedule: The rule.
        pipeline: The stages, also those of other devices.

    Raises:
        ScheduleError: The rule would get stuck, see `bounds`.
    """

    def __init__(self, schedule: Schedule, pipeline: Pipeline) -> None:
        self._schedule = schedule
        self._pipeline = pipeline
        self._bounds = bounds(schedule, pipeline)
        self._ready: dict[Action, int] = {}
        self._held: Counter[int] = Counter()
        self._forwards: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, action: Action) -> None:
        """Say that the inputs of an action are there.

        Raises:
            ScheduleError: It is waiting already.
        """
        if action in self._ready:
            raise ScheduleError(f"{action} is in the queue already; add each action once, when its inputs arrive")
        self._ready[action] = self._schedule.priority(action, self._pipeline)

    def take(self) -> Action | None:
        """The action to run now. None: nothing is there, or what is there has to wait for actions yet to come."""
        allowed = [(place, action) for action, place in self._ready.items() if self._may_run(action)]
        if not allowed:
            return None
        _, action = min(allowed)
        del self._ready[action]
        if action.op == "F":
            self._held[action.stage] += 1
            self._forwards[action.stage] += 1
        if action.op == self._pipeline.ops[-1]:
            self._held[action.stage] -= 1
        return action

    def _may_run(self, action: Action) -> bool:
        if action.op == "F":
            return self._held[action.stage] < self._bounds[action.stage]
        return not self._schedule.all_forwards_first or self._forwards[action.stage] == self._pipeline.micro_batches
