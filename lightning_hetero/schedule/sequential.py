"""The schedule `sequential`: one micro-batch at a time, there and back; the least memory and no overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import alternating, register_schedule


@register_schedule("sequential")
@dataclass(frozen=True)
class Sequential:
    """Let the next micro-batch in when the one before has left: plain gradient accumulation."""

    name: ClassVar[str] = "sequential"
    all_forwards_first: ClassVar[bool] = False
    splits_backward: ClassVar[bool] = False

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        """Forward and backward of one micro-batch, then of the next."""
        return alternating(action.op, action.micro_batch, warm_up=0)

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        """One, on the first stage and so everywhere."""
        return 1
