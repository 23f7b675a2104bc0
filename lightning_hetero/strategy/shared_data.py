"""The data that the processes of a run share: whose rows are whose in each batch, and in each pass over them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.processes.dealt_sampler import DealtBatchSampler
from lightning_hetero.runtime.processes.group import Group
from lightning_hetero.runtime.processes.loader import deal_loader, is_dealt_by_user, is_one_of_several
from lightning_hetero.runtime.processes.row_ledger import RowLedger, Rows
from lightning_hetero.schedule.dealing import Shares

TRAINING = "training"

log = logging.getLogger(__name__)


class SharedData:
    """Deals rows out, and knows of each batch how many rows every process has.

    Args:
        group: All processes.
        shares: How much of a batch each process gets, in proportion to the others.

    Attributes:
        deals: Whether rows are dealt out; False leaves that to user code.
        shares: How much of a batch each process gets.
        rows: Of the batch that runs now; None outside of steps, and where user code deals the data out.
        training_loaders: Asked for the data loaders that give one batch together.
    """

    def __init__(self, group: Group, shares: Sequence[float]) -> None:
        self._group = group
        self.shares = Shares(shares)
        self.deals = True
        self.rows: Rows | None = None
        self.training_loaders: Callable[[], Sequence[Any]] = tuple
        self._ledger = RowLedger()
        self._loaders = 0
        self._loop = TRAINING
        self._loops: dict[str, dict[str, set[int]]] = {}  # who had rows, by loop and loader
        self._rows_had: dict[str, int] = {}  # by loop, how many this process had in the pass that goes on
        self._last: dict[str, tuple[Any, int]] = {}  # by loop, the latest batch with rows, and their number

    def dealt(self, loader: Any) -> Any:
        """The loader of this process.

        Raises:
            UnsupportedError: The rows of its batches cannot be dealt out; on every process.
            UsageError: The processes have different loaders; on every process.
        """
        if not self.deals or is_dealt_by_user(loader):
            return loader
        self._loaders += 1
        if not isinstance(loader, DataLoader):
            raise UnsupportedError(
                f"data loader {self._loaders} is a {type(loader).__name__} and no torch.utils.data.DataLoader, so "
                "nobody can deal its rows out to processes: each would use all of them. Use a DataLoader, or "
                "Trainer(use_distributed_sampler=False) with a loader that gives each process another part of the "
                "data, by torch.distributed.get_rank() and get_world_size()."
            )
        if (loader.batch_size or self._group.size) < self._group.size and self._group.rank == 0:
            log.warning(
                "batches of %s rows are worked on by one process after the other, as there are %s; a batch size of at "
                "least the number of processes lets all of them work",
                loader.batch_size,
                self._group.size,
            )
        name = f"data loader {self._loaders}"
        return deal_loader(loader, self._group, self.shares, self._ledger, name, self._is_joined)

    def _is_joined(self, sampler: DealtBatchSampler) -> bool:
        return is_one_of_several(sampler, self.training_loaders())

    def take(self, convert: Callable[[Any], Any], batch: Any) -> Any:
        """A batch comes from its loader. Stands before the host's conversion of its precision.

        Where this process has no rows, hooks of user code get an empty batch like the one before.
        """
        self.rows = rows = self._ledger.of(batch)
        if rows is not None:
            self._saw(rows)
            if self._loop != TRAINING:  # of those of the training, `training_begins` counts the rows
                self._rows_had[self._loop] += rows.own
            if rows.own:
                self._last[self._loop] = batch, rows.own
            elif self._loop in self._last:
                batch = _emptied(*self._last[self._loop])
        return convert(batch)

    def begin_loop(self, name: str) -> None:
        """A pass over data begins: its batches come from now on."""
        self._loop = name
        self._loops[name] = {}
        self._rows_had[name] = 0
        self._last.pop(name, None)

    def end_loop(self) -> None:
        """It is over, and training may go on."""
        self._loop = TRAINING

    def training_begins(self, *, is_first: bool) -> None:
        """A batch of the training was taken.

        Args:
            is_first: Whether it is the first one of its epoch.
        """
        self._loop = TRAINING
        if is_first:
            self._loops[TRAINING] = {}
        had = 0 if is_first else self._rows_had.get(TRAINING, 0)
        self._rows_had[TRAINING] = had + (0 if self.rows is None else self.rows.own)
        if self.rows is not None:
            self._saw(self.rows)

    def _saw(self, rows: Rows) -> None:
        had = self._loops.setdefault(self._loop, {}).setdefault(rows.loader, set())
        had.update(rank for rank, size in enumerate(rows.sizes) if size)

    def count(self, own: int) -> None:
        """Learn how many rows all processes have, if user code has dealt them out."""
        if self.rows is None:
            self.rows = Rows(tuple(self._group.gather(own)), self._group.rank)
            self._rows_had[TRAINING] = self._rows_had.get(TRAINING, 0) + own

    @property
    def rows_had(self) -> int:
        """How many rows this process had so far in the pass over data that goes on; 0 if nobody counts them."""
        return self._rows_had.get(self._loop, 0)

    @property
    def is_idle(self) -> bool:
        """Whether this process has no row of the batch that runs now."""
        return self.rows is not None and self.rows.own == 0

    @property
    def is_incomplete(self) -> bool:
        """Whether some process has no row of the batch that runs now."""
        return self.rows is not None and 0 in self.rows.sizes

    @property
    def weight(self) -> float:
        """The part of the batch that this process has."""
        return 1.0 if self.rows is None else self.rows.own / self.rows.total

    def without_rows(self) -> Mapping[str, Sequence[int]]:
        """Who had no row in the pass over data that goes on: by name of the loader, the processes."""
        missing = {
            loader: [rank for rank in range(self._group.size) if rank not in had]
            for loader, had in self._loops.get(self._loop, {}).items()
        }
        return {loader: ranks for loader, ranks in missing.items() if ranks}


def _emptied(batch: Any, rows: int) -> Any:
    """The same without rows."""

    def cut(leaf: Any) -> Any:
        return leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf

    return tree_map(cut, batch)
