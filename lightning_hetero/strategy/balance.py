"""Shares of the processes that follow how fast they turn out to be."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from lightning_hetero.runtime.processes.loader import DealtLoader, handed_out
from lightning_hetero.schedule.rebalance import rebalanced
from lightning_hetero.strategy.team import Team

log = logging.getLogger(__name__)

CHECKS = (12, 40, 120, 400)
"""Steps of a run after which shares may change: few, because each change costs some balance of its own if it errs."""
_WARM = 3


class Balance:
    """Watches what a row costs each process, and lets all of them change their shares between two steps.

    The seconds of a process are those from step to step without what it spent in exchanges, where the faster ones wait
    for the slower. The lower quartile counts, as validation, checkpoints and other programs only add to a step.

    Args:
        team: All processes, with the rows of each step.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._steps = 0
        self._s_per_row: list[float] = []
        self._began_s: float | None = None
        self._own = 0

    def step_begins(self, loaders: Iterable[Any]) -> None:
        """Between two steps, on all processes.

        Args:
            loaders: Of the training.
        """
        team = self._team
        now_s = time.perf_counter() - team.waited_s
        if self._began_s is not None and self._own and self._steps > _WARM:
            self._s_per_row.append((now_s - self._began_s) / self._own)
        if self._steps in CHECKS:
            self._look([loader for loader in loaders if isinstance(loader, DealtLoader)])
            now_s = time.perf_counter() - team.waited_s
        self._steps += 1
        self._began_s = now_s
        self._own = 0 if team.data.rows is None else team.data.rows.own

    def _look(self, loaders: list[DealtLoader]) -> None:
        costs = sorted(self._s_per_row)
        self._s_per_row = []
        typical_s = costs[len(costs) // 4] if costs else 0.0
        ahead = max((handed_out(loader) for loader in loaders), default=0)
        said = self._team.group.gather((typical_s, ahead, len(loaders)))
        shares = self._team.data.shares
        if any(count != 1 for _, _, count in said):  # several in one step have to change at the same one
            return
        new = rebalanced(shares.current, [seconds for seconds, _, _ in said])
        if new is None:
            return
        shares.change(new, max(ahead for _, ahead, _ in said))
        if self._team.group.rank == 0:
            words = ", ".join(f"{100 * share:.0f} %" for share in new)
            log.info("the %d processes now get %s of the rows of a batch, by their speeds", len(new), words)
