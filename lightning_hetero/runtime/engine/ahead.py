"""What a micro-batch of a step does next, as earlier ones have shown: its device may wait for it rather than be late.

A device takes what is there. But a schedule may want something that is about to come: a backward after the forward on
the last stage, for which user code computes no more than the loss. If the device took the next forward meanwhile, the
backward would come a whole task later, and everything that waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_hetero.schedule import Op

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.cut import Unit
    from lightning_hetero.runtime.engine.lanes import Lane

PATIENCE = 1 / 4
"""How long a device waits for a task that is about to come: this share of what its tasks take."""
_WEIGHT = 1 / 4  # of the last time in the mean of all


class Ahead:
    """The calls of units in a step, in order, and how long user code takes between them."""

    def __init__(self) -> None:
        self._units: Sequence[Unit | None] = ()
        self._between_s: dict[tuple[Op, int], float] = {}

    @property
    def is_known(self) -> bool:
        """Whether any micro-batch has shown the way."""
        return bool(self._units)

    def learn(self, lane: Lane) -> None:
        """Note what a lane has called, at the end of its forward."""
        units: list[Unit | None] = [None] * len(lane.trace)
        for call in lane.units:
            units[call.number] = call.unit
        self._units = units

    def after(self, op: Op, number: int) -> tuple[Op, int] | None:
        """What follows.

        Args:
            op: "F" for the forward of a call, "B" for its backward.
            number: Index of the call in its lane.

        Returns:
            The same of what follows; None after the last.
        """
        if op == "F":
            return ("F", number + 1) if number + 1 < len(self._units) else ("B", number)
        return ("B", number - 1) if number else None

    def unit(self, number: int) -> Unit | None:
        """What is called; None if it is not known, or has no backward."""
        return self._units[number] if number < len(self._units) else None

    def between_s(self, op: Op, number: int) -> float:
        """Seconds from the end of a task to what follows it; 0 if it is not known."""
        return self._between_s.get((op, number), 0.0)

    def note_time(self, op: Op, number: int, seconds: float) -> None:
        """It took so long."""
        known = self._between_s.get((op, number))
        self._between_s[op, number] = seconds if known is None else known + _WEIGHT * (seconds - known)
