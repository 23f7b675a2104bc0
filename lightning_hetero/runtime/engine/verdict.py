"""What a trial has found about a kind of call of a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lightning_hetero.runtime.engine.batch import NO_SIZE, Cut, Size
from lightning_hetero.runtime.engine.readings import MOST_READINGS, Readings


@dataclass(frozen=True)
class Verdict:
    """What the trial found.

    Attributes:
        cut: Where to cut; None if the region has to run whole.
        reason: Why it has to run whole, in words that follow "because".
        draws: Whether the region draws random numbers.
        traced: Places of the outputs that have a graph where gradients are recorded; None if that was not looked at.
        upstream: Places of the outputs of which others are made.
        views: Places of outputs that are parts of other outputs in memory, with the places of these.
        size: Of the batch that was tried.
        final: Whether another trial would find the same. A module may fill a cache at its first call.
        readings: What has to be the same in tensors that code has read; None if it has read none.
        others: Verdicts on the same kind of call for other readings.
    """

    cut: Cut | None
    reason: str = ""
    draws: bool = False
    traced: tuple[int, ...] | None = None
    upstream: tuple[int, ...] = ()
    views: tuple[tuple[int, int], ...] = ()
    size: Size = NO_SIZE
    final: bool = True
    readings: Readings | None = field(default=None, compare=False)
    others: tuple[Verdict, ...] = field(default=(), compare=False)

    def on(self, tensors: Sequence[Tensor]) -> Verdict | None:
        """The verdict that holds for what tensors contain now; None if there is none.

        Args:
            tensors: Those among the inputs.
        """
        for verdict in (self, *self.others):
            if verdict.readings is None or verdict.readings.hold(tensors):
                return verdict
        return None

    def beside(self, known: Verdict | None, tensors: Sequence[Tensor]) -> Verdict:
        """What to keep after another trial for the same kind of call.

        Args:
            known: What was kept so far.
            tensors: Those among the inputs.
        """
        if known is None or self.readings is None:
            return self
        before = (replace(verdict, others=()) for verdict in (known, *known.others))
        others = tuple(each for each in before if not (each.readings is None or each.readings.hold(tensors)))
        if len(others) >= MOST_READINGS:
            return Verdict(None, "its code reads the content of a tensor, which keeps changing")
        return replace(self, others=others)
