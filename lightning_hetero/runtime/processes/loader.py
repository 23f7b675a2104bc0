"""A data loader that gives one of several processes its rows of every batch.

The user's loader stays as it is, batch size included: what it gives to one process is dealt out to all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import new_class
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from lightning_hetero.errors import UsageError
from lightning_hetero.runtime.processes.dealt_sampler import DealtBatchSampler, Turn
from lightning_hetero.runtime.processes.exchange import Exchange
from lightning_hetero.runtime.processes.loader_agreement import agree_on_loader
from lightning_hetero.runtime.processes.row_ledger import NO_ROWS, Page, RowLedger
from lightning_hetero.schedule.dealing import Shares

_STATE = "lightning_hetero"


def deal_loader(
    loader: DataLoader[Any],
    exchange: Exchange,
    shares: Shares | Sequence[float],
    ledger: RowLedger,
    name: str,
    is_joined: Callable[[DealtBatchSampler], bool] | None = None,
) -> DataLoader[Any]:
    """A copy of a data loader that gives this rank's rows of every batch; all ranks have to call this, in one order.

    The copy has as many batches as the original, and gives `NO_ROWS` in place of those of which this rank has no rows.
    Its class is a subclass of the original's, with the same name. `in_order` is True. Every iteration begins with
    a broadcast of the order, so all ranks have to iterate at the same times.

    Args:
        loader: The user's, which stays as it is. A copy made by this function is dealt anew.
        exchange: Between the ranks.
        shares: How much each rank gets, in proportion to the others.
        ledger: Told of every batch.
        name: Of the loader, in messages.
        is_joined: See `DealtBatchSampler`.

    Raises:
        UnsupportedError: It reads a stream, makes no batches, or goes on for ever.
        UsageError: The shares are not as many as the ranks, the ranks have different loaders, or there are fewer rows
            than ranks.
    """
    shares = shares if isinstance(shares, Shares) else Shares(shares)
    source = _users_batch_sampler(loader.batch_sampler)
    at_once = agree_on_loader(loader, source, exchange, shares, name)
    sampler = DealtBatchSampler(source, exchange, shares)
    if is_joined is not None:
        sampler.is_joined = is_joined
    dealt = copy.copy(loader)
    dealt.__class__ = _dealt_class(type(loader))
    # Not by setattr: a data loader refuses a new batch sampler.
    vars(dealt).update(
        batch_sampler=_worn_by(loader.batch_sampler, sampler),
        in_order=True,
        _iterator=None,  # of persistent workers, which stay the original's
        _deal=_Deal(sampler, ledger.page(name), type(loader).__name__, at_once),
    )
    return dealt


def is_dealt_by_user(loader: Any) -> bool:
    """Whether the user's own sampler gives each process its part, as torch's `DistributedSampler` does."""
    batch_sampler = _users_batch_sampler(getattr(loader, "batch_sampler", None))
    candidates = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return any(
        isinstance(sampler, DistributedSampler) or (hasattr(sampler, "num_replicas") and hasattr(sampler, "rank"))
        for sampler in candidates
    )


def is_one_of_several(sampler: DealtBatchSampler, loaders: Iterable[Any]) -> bool:
    """Whether the sampler is that of one of these loaders, and there are others."""
    found = [isinstance(loader, DealtLoader) and loader._deal.sampler is sampler for loader in loaders]
    return len(found) > 1 and any(found)


def handed_out(loader: DataLoader[Any]) -> int:
    """Batches of the running iteration that are dealt, those that workers are loading included.

    Args:
        loader: Made by `deal_loader`.
    """
    assert isinstance(loader, DealtLoader), "made by deal_loader"
    return loader._deal.sampler.handed_out


@dataclass(frozen=True, slots=True)
class _Deal:
    """What a dealt loader needs besides what its original has.

    Attributes:
        sampler: Where the indices come from.
        page: Told of every batch.
        class_name: Of the original.
        at_once: Whether an iteration draws its order when it begins, and not with its first batch.
    """

    sampler: DealtBatchSampler
    page: Page
    class_name: str
    at_once: bool


class DealtLoader(DataLoader[Any]):
    """What the classes of all dealt loaders have in common."""

    _deal: _Deal

    def __iter__(self) -> Any:
        before = self._deal.sampler.turn
        return _DealtIterator(iter(super().__iter__()), self._deal, before)


class StatefulDealtLoader(DealtLoader):
    """A dealt loader of a class that can say where it is, and go on there.

    The original's own state is that of one process: it knows neither who gets which rows nor the batches of which its
    process has none. So this one has a state of its own, with the order of the iteration.
    """

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration that goes on is; the same on every rank."""
        return {_STATE: self._deal.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on there; on every rank.

        Raises:
            UsageError: It is the state of a loader that was not dealt out.
        """
        if _STATE not in state:
            raise UsageError(
                f"the checkpoint has a place in the epoch that {self._deal.page.name} had in one process, and several "
                "processes share batches in another way. Resume with one process, or from the end of an epoch."
            )
        self._deal.sampler.load_state_dict(state[_STATE])


def _dealt_class(original: type[DataLoader[Any]]) -> type[DataLoader[Any]]:
    if issubclass(original, DealtLoader):
        return original
    namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    is_stateful = hasattr(original, "state_dict") and hasattr(original, "load_state_dict")
    dealt = StatefulDealtLoader if is_stateful else DealtLoader
    bases = (dealt,) if original is DataLoader else (dealt, original)
    return new_class(original.__name__, bases, exec_body=lambda body: body.update(namespace))


class _DealtIterator(Iterator[Any]):
    """The batches of a dealt loader: those of the original's iterator, and `NO_ROWS` between them."""

    def __init__(self, batches: Iterator[Any], deal: _Deal, before: Turn | None) -> None:
        self._batches = batches
        self._deal = deal
        self._before = before  # the turn of an earlier iteration
        self._turn = self._begun()
        if self._turn is not None and deal.at_once:
            self._turn.begin()
        self._held: list[Any] = []  # none or one: what was loaded while looking for the rows of the batches before it

    def __next__(self) -> Any:
        turn = self._turn
        if turn is None or turn.given >= len(turn.rows):
            self._load()
            turn = self._turn or self._begun()
        if turn is None or (turn.given >= len(turn.rows) and self._held):
            raise self._out_of_step()
        self._turn = turn
        if turn.given >= len(turn.rows):
            raise StopIteration
        rows = turn.rows[turn.given]
        if rows.own and not self._held:
            self._load()
            if not self._held:
                raise self._out_of_step()
        batch = self._held.pop() if rows.own else NO_ROWS
        turn.given += 1
        self._deal.page.enter(batch, rows)
        return batch

    def _begun(self) -> Turn | None:
        """The turn of this iteration; None until a class of the user's, which may wait for that, asks for a batch."""
        turn = self._deal.sampler.turn
        return None if turn is self._before else turn

    def _load(self) -> None:
        with suppress(StopIteration):
            self._held.append(next(self._batches))

    def _out_of_step(self) -> UsageError:
        return UsageError(
            f"{self._deal.page.name} does not give one batch for every batch of its batch sampler: its class "
            f"{self._deal.class_name} has a way of its own to iterate, so nobody knows which process has how many rows "
            "of a batch. Use a torch.utils.data.DataLoader, and change batches in the dataset, collate_fn or step."
        )


def _users_batch_sampler(batch_sampler: Any) -> Any:
    """The user's own, inside of what Lightning and this module put around it."""
    while True:
        if isinstance(batch_sampler, DealtBatchSampler):
            batch_sampler = batch_sampler.source
        elif _records_indices(batch_sampler):
            batch_sampler = batch_sampler._batch_sampler
        else:
            return batch_sampler


def _records_indices(batch_sampler: Any) -> bool:
    """Whether it is what Lightning's prediction loop puts around a batch sampler to know the indices of batches."""
    return type(batch_sampler).__name__ == "_IndexBatchSamplerWrapper"


def _worn_by(original: Any, sampler: DealtBatchSampler) -> Any:
    """The dealt sampler, inside a copy of what Lightning put around the original."""
    if not _records_indices(original):
        return sampler
    recorder = copy.copy(original)
    recorder._batch_sampler = sampler
    sampler.skipped = lambda: recorder.seen_batch_indices.append([])
    return recorder
