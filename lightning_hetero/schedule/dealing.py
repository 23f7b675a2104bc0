"""Which rows of every batch belong to which process, where the processes share batches unequally.

All processes compute the same from the same shares: there is no chance in it, and nothing that differs between hosts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_hetero.errors import ScheduleError, UsageError


class Dealer:
    """Deals the rows of one batch after the other out to ranks, in proportion to their shares.

    The largest remainder over all batches so far: what a rank did not get of one batch, because rows are whole, counts
    in its favour in the next. So batches too small for everybody still reach the shares in the long run. A batch with
    at least as many rows as there are ranks has a row for each of them; what a rank gets for that reason alone is
    neither taken from it nor made up to the others later.

    Args:
        shares: How much each rank gets, in proportion to the others; all above 0.

    Raises:
        ScheduleError: There are no shares, or one is not above 0.

    Example:
        >>> dealer = Dealer((1, 3))
        >>> dealer.deal(8), dealer.deal(1), dealer.deal(1), dealer.deal(1), dealer.deal(1)
        ((2, 6), (0, 1), (1, 0), (0, 1), (0, 1))
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._weights = _weights(shares)
        self._owed = [0.0] * len(self._weights)  # rows that each rank is behind its share, negative: ahead of it

    def deal(self, rows: int) -> tuple[int, ...]:
        """Rows of each rank, in their order; ranks own consecutive blocks of the batch.

        Args:
            rows: Of the batch.

        Raises:
            ScheduleError: Less than none.
        """
        if rows < 0:
            raise ScheduleError(f"a batch has 0 rows or more, got {rows}")
        least = int(rows >= len(self._weights))
        due = [owed + quota for owed, quota in zip(self._owed, self._quotas(rows, least), strict=True)]
        sizes = [max(least, math.floor(rows_due + 1e-9)) for rows_due in due]
        while (missing := rows - sum(sizes)) != 0:
            # Rounded, so that of ranks that are owed the same the first one is next, whatever floats make of it.
            behind = [round(rows_due - size, 9) for rows_due, size in zip(due, sizes, strict=True)]
            if missing > 0:
                sizes[behind.index(max(behind))] += 1
            else:
                sizes[behind.index(min(b for b, size in zip(behind, sizes, strict=True) if size > least))] -= 1
        self._owed = [round(rows_due - size, 9) for rows_due, size in zip(due, sizes, strict=True)]
        return tuple(sizes)

    def forget(self) -> None:
        """Deal as if the next batch were the first one."""
        self._owed = [0.0] * len(self._weights)

    def change(self, shares: Sequence[float]) -> None:
        """Deal by other shares from now on.

        Raises:
            ScheduleError: They are not as many as before, or one is not above 0.
        """
        weights = _weights(shares)
        if len(weights) != len(self._weights):
            raise ScheduleError(f"{len(self._weights)} ranks need {len(self._weights)} shares, got {len(weights)}")
        self._weights = weights

    def _quotas(self, rows: int, least: int) -> list[float]:
        """Each rank's part of the rows, as a fraction: at least `least`, the others in proportion to their shares."""
        raised: set[int] = set()
        while True:
            others = math.fsum(weight for rank, weight in enumerate(self._weights) if rank not in raised)
            left = rows - least * len(raised)
            quotas = [
                float(least) if rank in raised else left * (weight / others)
                for rank, weight in enumerate(self._weights)
            ]
            below = {rank for rank, quota in enumerate(quotas) if quota < least}
            if not below or len(raised | below) == len(quotas):
                return [max(float(least), quota) for quota in quotas]
            raised |= below


class Shares:
    """The shares of the ranks, which may change while batches are dealt.

    Args:
        shares: How much each rank gets, in proportion to the others; all above 0.

    Raises:
        ScheduleError: There are no shares, or one is not above 0.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        _weights(shares)
        self._history: list[tuple[int, tuple[float, ...]]] = [(0, tuple(shares))]

    @property
    def current(self) -> tuple[float, ...]:
        """Those that were set last."""
        return self._history[-1][1]

    def change(self, shares: Sequence[float], from_batch: int) -> None:
        """Other shares from some batch of each running iteration on, and in every later iteration from its beginning.

        Args:
            shares: One for each rank, all above 0.
            from_batch: Number of a batch, from 0, that no rank has dealt yet: the largest number, over all ranks, of
                batches that they have handed out. Every rank has to say the same.

        Raises:
            ScheduleError: The shares are not as many as before, or one is not above 0.
        """
        if len(shares) != len(self.current):
            raise ScheduleError(f"{len(self.current)} ranks need {len(self.current)} shares, got {len(shares)}")
        _weights(shares)
        self._history.append((from_batch, tuple(shares)))


class Dealing:
    """How the batches of one iteration are dealt: a function of their sizes and of the history of the shares.

    Args:
        shares: Of the ranks.
        carries: Whether what a rank did not get of one batch counts in its favour in the next; see `Dealer`. Without,
            batches of one size are all dealt alike.
    """

    def __init__(self, shares: Shares, *, carries: bool = True) -> None:
        self._shares = shares
        self._carries = carries
        self._seen = len(shares._history)
        self._dealer = Dealer(shares.current)
        self._number = 0

    def deal(self, rows: int) -> tuple[int, ...]:
        """Rows of each rank in the next batch.

        Raises:
            UsageError: Shares were to change from a batch on that had been dealt before the change was known.
        """
        history = self._shares._history
        due = [index for index in range(self._seen, len(history)) if history[index][0] <= self._number]
        if due:  # later changes replace earlier ones that have not begun yet
            from_batch, shares = history[due[-1]]
            if from_batch < self._number:
                raise UsageError(
                    f"the shares were to change from batch {from_batch} on, but {self._number} batches are dealt "
                    "already, so ranks would disagree on whose rows are whose. Change them from the largest number of "
                    "batches on that any rank has handed out."
                )
            self._dealer.change(shares)
            self._seen = due[-1] + 1
        self._number += 1
        if not self._carries:
            self._dealer.forget()
        return self._dealer.deal(rows)


def _weights(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares, the largest of them being 1."""
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares):
        raise ScheduleError(f"every rank needs a finite share above 0, got {tuple(shares)}")
    largest = max(shares)
    return tuple(share / largest for share in shares)
