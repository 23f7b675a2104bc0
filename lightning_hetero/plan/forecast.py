"""What a plan says beyond places: how to run, what that will take, and what was rejected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_hetero.errors import ScheduleError

WHOLE = "whole"
FORWARD = "forward"
MOST_MICRO_BATCHES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a placed model runs a batch.

    Attributes:
        micro_batches: How many a batch is cut into.
        schedule: "whole": one unit after the other. "forward": `micro_batching="forward"`, where the loss sees the
            whole batch. Any other word: the schedule of that name with `micro_batching="step"`.
        rematerialize: Whether the backward runs forwards again instead of keeping activations; with "forward" only.
        weights: Shares of the rows that micro-batches get, in proportion to each other; none: all the same.

    Raises:
        ScheduleError: They contradict each other.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("weights",)

    micro_batches: int = 1
    schedule: str = WHOLE
    rematerialize: bool = False
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ScheduleError(f"a step has at least 1 micro-batch, got {self.micro_batches}")
        if self.micro_batches > MOST_MICRO_BATCHES:
            raise ScheduleError(
                f"a step has at most {MOST_MICRO_BATCHES} micro-batches, got {self.micro_batches}: each costs time of "
                "its own, and a few for each device are enough"
            )
        if self.schedule == WHOLE and self.micro_batches > 1:
            raise ScheduleError(
                f"schedule 'whole' runs a batch in one piece, so it has 1 micro-batch and not {self.micro_batches}; "
                "take the schedule 'forward'"
            )
        if self.rematerialize and self.schedule != FORWARD:
            raise ScheduleError(
                f"schedule {self.schedule!r} keeps its activations; rematerialize needs the schedule 'forward'"
            )
        if self.weights and (len(self.weights) != self.micro_batches or not all(w > 0 for w in self.weights)):
            raise ScheduleError(
                f"weights are shares of the rows, one above 0 for each of the {self.micro_batches} micro-batches, got "
                f"{self.weights}"
            )
        if not math.isfinite(sum(self.weights)):
            raise ScheduleError(f"weights are shares of the rows and need a finite sum, got {self.weights}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceForecast:
    """What one device will do in a step.

    Attributes:
        device: Its name.
        busy_s: Seconds that it computes, optimizer included. The rest of the step is its slack.
        transfer_s: Seconds that tensors are on their way to it.
        memory_bytes: The most that it needs at a time, activations included.
        limit_bytes: What the plan may use of it.
    """

    device: str
    busy_s: float
    transfer_s: float
    memory_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """What one stage, or one replica of it, will do in a step: all of its micro-batches together.

    Attributes:
        stage: Its place among the stages of the plan, from 0.
        device: Name of its device.
        forward_s: Seconds of its forwards, without transfers.
        backward_s: Seconds of its backwards, with the forwards that these repeat; 0 without training.
        kept_bytes: What it keeps for backwards when it keeps the most: activations and inputs of all micro-batches
            that are under way at once. 0 without training.
        sent_bytes: What its forwards send to other devices. Gradients of as many bytes come back, at most.
    """

    stage: int
    device: str
    forward_s: float
    backward_s: float
    kept_bytes: int
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a step will take.

    Attributes:
        step_s: Seconds of a step, optimizer included.
        devices: The devices that take part, in the order of the inventory, the root always.
        bottleneck: What to make faster first, in words: "compute of cuda:1", "link cuda:0 -> cpu".
        estimated: Whether seconds come from data sheets and sizes, and not from a clock.
        stages: In the order of the plan, the replicas of a stage as it names them. None in plans of earlier releases,
            and where only whole placements were compared.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("stages",)

    step_s: float
    devices: tuple[DeviceForecast, ...]
    bottleneck: str
    estimated: bool
    stages: tuple[StageForecast, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What was considered and rejected.

    Attributes:
        policy: Name of the policy, with how it would run.
        step_s: Predicted seconds of a step; None if it does not fit.
        reason: Why not.
    """

    policy: str
    step_s: float | None
    reason: str
