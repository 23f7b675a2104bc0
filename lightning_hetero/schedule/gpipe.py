"""The schedule `gpipe`: all forwards, then all backwards, so the loss may look at the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import alternating, register_schedule


@register_schedule("gpipe")
@dataclass(frozen=True)
class GPipe:
    """Begin no backward before all forwards are done. Every stage holds all micro-batches.

    References:
        Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, NeurIPS 2019.
    """

    name: ClassVar[str] = "gpipe"
    all_forwards_first: ClassVar[bool] = True
    splits_backward: ClassVar[bool] = False

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        """Forwards before backwards, and among them the lowest micro-batch."""
        return alternating(action.op, action.micro_batch, warm_up=pipeline.micro_batches)

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        """All micro-batches."""
        return pipeline.micro_batches
