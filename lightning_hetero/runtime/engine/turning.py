"""Where the micro-batches of a step turn back, from forward to backward: the device of the last call may wait for them.

A device takes what is there. But `1f1b` wants the backward of a micro-batch right after its forward on the last stage,
and user code computes the loss in between. If the device took the next forward meanwhile, the backward would come a
whole task later; and where stages are equal and few micro-batches may be under way, all stages lose that time.
"""

from __future__ import annotations

PATIENCE = 1 / 4
"""How long a device waits: this share of what its tasks take, and not at all where user code was slower so far."""
MUCH_BUSIER = 1.25
"""A device that has so many times as much to do as any other never waits: the step would take longer by that time."""
_WEIGHT = 1 / 4  # of the last time in the mean of all


class TurningPoint:
    """The last call of a unit in the forward of a micro-batch.

    Attributes:
        number: Its index among the calls; None before any micro-batch has shown it.
        loss_s: Seconds from its end to the beginning of its backward, the mean of the last ones.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.loss_s = 0.0

    def note(self, seconds: float) -> None:
        """It took so long."""
        self.loss_s += (_WEIGHT if self.loss_s else 1.0) * (seconds - self.loss_s)
