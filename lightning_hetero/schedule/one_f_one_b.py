"""The schedule `1f1b`: warm up, then one forward and one backward in turn, so few micro-batches are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import alternating, register_schedule


@register_schedule("1f1b")
@dataclass(frozen=True)
class OneFOneB:
    """Hold no more micro-batches on a stage than there are stages from it to the end, plus `spare`.

    Without spare ones, and with equal stages and instant transfers, no device waits between warm-up and drain.
    But then each micro-batch arrives just in time, and any delay on the way leaves a gap in every turn; one
    spare micro-batch fills it, at the price of what it keeps in memory.

    Attributes:
        spare: Micro-batches in flight beyond the number of stages.

    References:
        Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, ICML 2021 (PipeDream-Flush).
    """

    name: ClassVar[str] = "1f1b"
    all_forwards_first: ClassVar[bool] = False
    splits_backward: ClassVar[bool] = False
    spare: int = 1

    def __post_init__(self) -> None:
        if self.spare < 0:
            raise ScheduleError(f"spare must be 0 or more micro-batches, got {self.spare}; sequential holds fewer")

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        """The place in the schedule without spare micro-batches: they fill gaps, they do not move others."""
        return alternating(action.op, action.micro_batch, warm_up=pipeline.stages - 1 - action.stage)

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        """One for each stage from this one to the last, and the spare ones."""
        return pipeline.stages - stage + self.spare
