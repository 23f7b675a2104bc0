"""One entry of a program: a stage does one thing with one micro-batch, written `2F0` as torch writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lightning_hetero.errors import ScheduleError

Op = Literal["F", "B", "I", "W"]
"""Forward, backward, or the two halves of a split backward: input gradient and weight gradient."""

_OPS = get_args(Op)
_TEXT = re.compile(r"([0-9]+)([FBIW])([0-9]+)")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """What one stage does with one micro-batch.

    The text form is that of `torch.distributed.pipelining`: stage, op, micro-batch.

    Attributes:
        stage: Index of the stage, from 0.
        op: See `Op`.
        micro_batch: Index of the micro-batch, from 0.

    Example:
        >>> str(Action(2, "F", 0)), Action.parse("2F0")
        ('2F0', Action(stage=2, op='F', micro_batch=0))
    """

    stage: int
    op: Op
    micro_batch: int

    def __post_init__(self) -> None:
        if self.op not in _OPS:
            raise ScheduleError(f"unknown op {self.op!r} of an action; known are {', '.join(_OPS)}")
        if self.stage < 0 or self.micro_batch < 0:
            raise ScheduleError(
                f"stages and micro-batches count from 0, got stage {self.stage} and micro-batch {self.micro_batch}"
            )

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read what `str` wrote; blanks around it do not matter.

        Raises:
            ScheduleError: The text is not an action.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(
                f"{text!r} is not an action; write stage, op ({', '.join(_OPS)}) and micro-batch, such as '2F0'"
            )
        stage, op, micro_batch = match.groups()
        return cls(int(stage), cast(Op, op), int(micro_batch))
