"""Event simulation of one training step through a pipeline of unequal stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["1f1b", "gpipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What one micro-batch costs on one stage, in seconds.

    Attributes:
        forward_s: Its forward pass.
        backward_s: Its backward pass.
        send_forward_s: Moving the output to the next stage.
        send_backward_s: Moving the gradient to the stage before.
        update_s: The optimizer's step, once for all micro-batches.
    """

    forward_s: float
    backward_s: float
    send_forward_s: float = 0.0
    send_backward_s: float = 0.0
    update_s: float = 0.0

    @property
    def load_s(self) -> float:
        """Time that one micro-batch takes from this stage if it sends by itself."""
        return self.forward_s + self.backward_s + self.send_forward_s + self.send_backward_s


def in_flight(stages_behind: int, micro_batches: int, schedule: Schedule) -> int:
    """Micro-batches whose activations a stage keeps at once; the last stage has 0 stages behind it."""
    return min(micro_batches, stages_behind + 1) if schedule == "1f1b" else micro_batches


def max_load_s(stages: Sequence[StageCost]) -> float:
    """The load of the slowest stage: the time per micro-batch of a pipeline that never drains."""
    return max(stage.load_s for stage in stages)


def step_formula_s(stages: Sequence[StageCost], micro_batches: int) -> float:
    """Fill and drain once, and the slowest load for every further micro-batch; no optimizer."""
    return sum(stage.load_s for stage in stages) + (micro_batches - 1) * max_load_s(stages)


def step_time_s(stages: Sequence[StageCost], micro_batches: int, schedule: Schedule) -> float:
    """Simulated time of a step, with the slowest optimizer update at its end.

    A stage does one thing at a time, in the order of the schedule. A transfer occupies neither stage; a link
    carries one message at a time in each direction.

    Args:
        stages: From the first to the last.
        micro_batches: How many make up a batch.
        schedule: "gpipe" does all forwards, then all backwards. "1f1b" does as many forwards ahead as there are
            stages from here to the end, then alternates.

    Example:
        >>> stages = [StageCost(forward_s=1.0, backward_s=2.0)] * 2
        >>> step_time_s(stages, micro_batches=4, schedule="1f1b")
        15.0
    """
    return _Clockwork(stages, micro_batches, schedule).run() + max(stage.update_s for stage in stages)


class _Clockwork:
    """The state of a simulation: when each input arrives, and when each stage and link is free."""

    def __init__(self, stages: Sequence[StageCost], micro_batches: int, schedule: Schedule) -> None:
        count = len(stages)
        self.stages = stages
        self.micro_batches = micro_batches
        self.ahead = [in_flight(count - 1 - stage, micro_batches, schedule) for stage in range(count)]
        # Arrival times in order of micro-batch; what is not in the list has not arrived.
        self.inputs: list[list[float]] = [[] for _ in stages]
        self.inputs[0] = [0.0] * micro_batches
        self.gradients: list[list[float]] = [[] for _ in stages]
        self.forwards = [0] * count
        self.backwards = [0] * count
        self.free = [0.0] * count
        self.link_forward = [0.0] * count
        self.link_backward = [0.0] * count

    def run(self) -> float:
        """Work until nothing can go on; every stage that gets an input is looked at again."""
        waiting = list(range(len(self.stages)))
        while waiting:
            waiting = sorted({other for stage in waiting for other in self._work(stage)})
        return max(self.free)

    def _work(self, stage: int) -> set[int]:
        """Do what the stage can do now; say which stages got something to do."""
        woken = set()
        last = len(self.stages) - 1
        while self.backwards[stage] < self.micro_batches:
            lead = self.forwards[stage] - self.backwards[stage]
            if self.forwards[stage] < self.micro_batches and lead < self.ahead[stage]:
                if self.forwards[stage] >= len(self.inputs[stage]):
                    break
                self._forward(stage, last)
                woken.add(min(stage + 1, last))
            else:
                if self.backwards[stage] >= len(self.gradients[stage]):
                    break
                self._backward(stage)
                woken.add(max(stage - 1, 0))
        return woken - {stage}

    def _forward(self, stage: int, last: int) -> None:
        cost = self.stages[stage]
        end = max(self.free[stage], self.inputs[stage][self.forwards[stage]]) + cost.forward_s
        self.free[stage] = end
        self.forwards[stage] += 1
        if stage == last:
            self.gradients[stage].append(end)
            return
        self.link_forward[stage] = max(end, self.link_forward[stage]) + cost.send_forward_s
        self.inputs[stage + 1].append(self.link_forward[stage])

    def _backward(self, stage: int) -> None:
        cost = self.stages[stage]
        end = max(self.free[stage], self.gradients[stage][self.backwards[stage]]) + cost.backward_s
        self.free[stage] = end
        self.backwards[stage] += 1
        if stage == 0:
            return
        self.link_backward[stage] = max(end, self.link_backward[stage]) + cost.send_backward_s
        self.gradients[stage - 1].append(self.link_backward[stage])
