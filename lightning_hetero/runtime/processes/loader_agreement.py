"""Whether a data loader can be dealt out to processes, and whether all of them have the same one."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.runtime.processes.exchange import Exchange
from lightning_hetero.schedule.dealing import Shares


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a rank sees of its loader.

    Attributes:
        unsupported: Why it cannot be dealt; empty: it can.
        rows: Of the dataset; None if it does not know.
        batches: Of the loader.
        shares: Of the ranks.
        samples: A digest of the indices of the subsets that the dataset consists of; empty: there are none.
        workers: Whether it has worker processes, which ask for batches as soon as an iteration begins.
    """

    unsupported: str = ""
    rows: int | None = None
    batches: int | None = None
    shares: tuple[float, ...] = ()
    samples: str = ""
    workers: bool = False


def agree_on_loader(loader: DataLoader[Any], batch_sampler: Any, exchange: Exchange, shares: Shares, name: str) -> bool:
    """Raise on every rank, if on one of them a loader cannot be dealt, or if the ranks have different ones.

    Returns:
        Whether some rank asks for batches as soon as an iteration begins, so that all of them have to.

    Raises:
        UnsupportedError: It reads a stream, makes no batches, or goes on for ever.
        UsageError: The shares are not as many as the ranks, the ranks have different loaders, or there are fewer rows
            than ranks.
    """
    seen = [_Seen(*fields) for fields in exchange.gather(astuple(_look(loader, batch_sampler, shares, name)))]
    for rank in seen:
        if rank.unsupported:
            raise UnsupportedError(rank.unsupported)
    first = seen[0]
    _same(name, "number of rows", [rank.rows for rank in seen])
    _same(name, "number of batches", [rank.batches for rank in seen])
    if any(rank.samples != first.samples for rank in seen):
        raise UsageError(
            f"{name} has a dataset with a Subset whose indices are not the same in every process, so an index would "
            "mean another sample in each, and samples for validation could be trained on. Give random_split a seed, as "
            "in random_split(dataset, lengths, generator=torch.Generator().manual_seed(1)), or call "
            "lightning.seed_everything before, and split nowhere by rank."
        )
    if any(rank.shares != first.shares for rank in seen):
        raise UsageError(
            f"the processes do not agree on the shares of {name}: {_listed([rank.shares for rank in seen])}. Give "
            "all of them the same."
        )
    if len(first.shares) != exchange.size:
        raise UsageError(f"{exchange.size} processes need {exchange.size} shares of {name}, got {first.shares}")
    if first.rows is not None and first.rows < exchange.size:
        raise UsageError(
            f"{name} has a dataset of {first.rows} rows for {exchange.size} processes, and every process needs one at "
            "least. Start fewer processes, or use a larger dataset."
        )
    return any(rank.workers for rank in seen)


def _look(loader: DataLoader[Any], batch_sampler: Any, shares: Shares, name: str) -> _Seen:
    if isinstance(loader.dataset, IterableDataset):
        return _Seen(
            f"{name} reads a stream (IterableDataset), and the rows of a stream cannot be dealt out to processes: each "
            "would read all of them. Use Trainer(use_distributed_sampler=False), and let the dataset of each process "
            "give another part of the stream, by torch.distributed.get_rank() and get_world_size()."
        )
    if batch_sampler is None:
        return _Seen(
            f"{name} has batch_size=None, so it makes no batches whose rows could be dealt out to processes. Give it a "
            "batch_size or a batch_sampler."
        )
    try:
        batches = len(batch_sampler)
    except Exception as error:  # of the user's code; the other ranks wait for what this one sees
        return _Seen(
            f"{name} has a batch sampler ({type(batch_sampler).__name__}) without a length ({type(error).__name__}: "
            f"{error}), and process 0 draws all batches of an epoch at its beginning. Give it a __len__ that says how "
            "many batches there are."
        )
    rows = _length(lambda: len(loader.dataset))  # type: ignore[arg-type]
    return _Seen("", rows, batches, shares.current, _samples(loader.dataset), loader.num_workers > 0)


def _samples(dataset: Any) -> str:
    digest = hashlib.sha256()
    subsets = 0
    for indices in _subsets(dataset):
        subsets += 1
        values = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        try:
            digest.update(array("q", values).tobytes())
        except (TypeError, OverflowError):  # keys of another kind
            digest.update(repr(values).encode())
    return digest.hexdigest() if subsets else ""


def _subsets(dataset: Any) -> Iterator[Any]:
    """The indices of all subsets that a dataset consists of."""
    if isinstance(dataset, Subset):
        yield dataset.indices
        yield from _subsets(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _subsets(part)


def _length(of: Callable[[], int]) -> int | None:
    """None if it has none, as a dataset need not if the sampler knows its indices."""
    try:
        return of()
    except Exception:  # likewise
        return None


def _same(name: str, what: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        raise UsageError(
            f"{name} has not the same {what} in every process: {_listed(values)}. Each gets a part of every batch, so "
            "let each of them load the whole dataset, in the same order, and split it nowhere by rank."
        )


def _listed(values: list[Any]) -> str:
    return ", ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
