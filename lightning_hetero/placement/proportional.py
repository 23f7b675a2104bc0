"""The policy `proportional`: to each device as much work as it is fast, as in Whale (Jia et al., ATC 2022)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from lightning_hetero.placement.even import nearest
from lightning_hetero.placement.found import Found, place_by
from lightning_hetero.placement.improve import repair
from lightning_hetero.placement.judge import Judge
from lightning_hetero.placement.piece_costs import PieceCosts
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem


@register_policy("proportional")
@dataclass(frozen=True)
class ProportionalPolicy:
    """Give each usable device a run of units, in the order of the inventory, whose work is in proportion to its speed.

    Links are not looked at, and no device stays idle by choice. If a device is overfull, units move until all fit.
    """

    name: str = "proportional"

    def place(self, problem: Problem) -> Placement:
        """Share the work out."""
        return place_by(find, problem, self.name, "Work is shared out in proportion to the speed of the devices.")


def find(judge: Judge) -> Found:
    """The shares, with the best way to run them."""
    start = judge.best_execution(nearest(judge.pieces, judge.names, _shares(judge)))
    return Found(best=repair(judge, start))


def _shares(judge: Judge) -> list[int]:
    """For every piece, the index of the device in whose share of all work its middle lies."""
    costs, pieces = PieceCosts.of(judge, judge.executions[0]), len(judge.pieces)
    seconds = [
        [f + b for f, b in zip(costs.forward_s[name], costs.backward_s[name], strict=True)] for name in judge.names
    ]
    totals = [sum(row) for row in seconds]
    if not all(total > 0 for total in totals):  # then nothing is known of speed, and all devices count the same
        seconds, totals = [[1.0] * pieces] * len(totals), [float(pieces)] * len(totals)
    ends = list(accumulate(1 / total for total in totals))
    work = [sum(row[spot] / total for row, total in zip(seconds, totals, strict=True)) for spot in range(pieces)]
    parts = list(accumulate(work))
    middles = [(end - part / 2) / parts[-1] * ends[-1] for end, part in zip(parts, work, strict=True)]
    return [min(bisect_left(ends, middle), len(ends) - 1) for middle in middles]
