"""Data loaders whose batches are dealt out to ranks: as threads here, as real processes at the end.

Run as a program, this file is one of the processes: `python test_loader.py RANK FOLDER`.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from lightning_hetero.errors import ProcessError, UnsupportedError, UsageError
from lightning_hetero.runtime.processes.loader import deal_loader, handed_out, is_dealt_by_user
from lightning_hetero.runtime.processes.row_ledger import KEPT_BATCHES, NO_ROWS, RowLedger, Rows
from lightning_hetero.schedule.dealing import Shares

PROCESSES = 2
TIMEOUT_S = 60
OnRanks = Callable[..., list[Any]]
SHARES = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4)


class Numbers(Dataset[int]):
    """As many numbers as it is told, from 0; keeps the lists of indices that it was asked for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.asked.append(indices)
        assert indices, "asked for no rows"
        return indices


class Words(Dataset[str]):
    """Gives what it is asked for."""

    def __getitem__(self, index: str) -> str:
        return index


def rows_of(batch: Any) -> list[int]:
    return [] if batch is NO_ROWS else batch.tolist()


def make(rows: int, seed: int = 0, **arguments: Any) -> DataLoader[int]:
    return DataLoader(Numbers(rows), generator=torch.Generator().manual_seed(seed), **arguments)


def deal(loader: DataLoader[Any], exchange: Any, shares: Any, **more: Any) -> DataLoader[Any]:
    return deal_loader(loader, exchange, shares, more.get("ledger", RowLedger()), more.get("name", "train_dataloader"))


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def whole(results: list[Any]) -> list[list[Any]]:
    """What the ranks have of each batch, one behind the other."""
    errors = [result for result in results if isinstance(result, Exception)]
    assert errors == []
    return [joined(parts) for parts in zip(*results, strict=True)]


# Whose rows are whose


@given(
    SHARES,
    st.integers(0, 40),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_the_ranks_together_have_the_batches_of_one_process(
    on_ranks: OnRanks, shares: list[float], more: int, batch_size: int, drop_last: bool, shuffle: bool
) -> None:
    rows = len(shares) + more
    options = {"batch_size": batch_size, "drop_last": drop_last, "shuffle": shuffle}
    alone = make(rows, **options)
    expected = [[batch.tolist() for batch in alone] for epoch in range(2)]

    def work(exchange: Any) -> list[list[int]]:
        loader = deal(make(rows, seed=exchange.rank, **options), exchange, shares)
        assert len(loader) == len(alone)
        return [rows_of(batch) for epoch in range(2) for batch in loader]

    batches = whole(on_ranks(len(shares), work))
    assert batches == expected[0] + expected[1]
    if not drop_last:
        assert sorted(joined(batches[: len(alone)])) == list(range(rows))


@given(SHARES, st.lists(st.lists(st.integers(0, 9) | st.just(2**70), max_size=6), min_size=1, max_size=10))
def test_any_batch_sampler(on_ranks: OnRanks, shares: list[float], batches: list[list[int]]) -> None:
    class Raw(Dataset[Any]):
        def __getitem__(self, index: int) -> int:
            return index

    def work(exchange: Any) -> list[list[int]]:
        loader = DataLoader(Raw(), batch_sampler=batches if exchange.rank == 0 else [[5]] * len(batches))
        loader.collate_fn = list
        return [[] if batch is NO_ROWS else batch for batch in deal(loader, exchange, shares)]

    assert whole(on_ranks(len(shares), work)) == batches


@pytest.mark.parametrize(
    "batches",
    [
        [("a", "b", "c"), ("d",)],
        [torch.tensor([3, 1, 2]), torch.tensor([0])],
        [[(0, 64), (1, 32)], [(2, 32)]],
    ],
)
def test_other_indices_than_numbers_keep_their_type(on_ranks: OnRanks, batches: list[Any]) -> None:
    class Raw(Dataset[Any]):
        def __getitem__(self, index: Any) -> Any:
            return index

    def work(exchange: Any) -> list[Any]:
        loader = DataLoader(Raw(), batch_sampler=batches, collate_fn=list)
        return [[] if batch is NO_ROWS else batch for batch in deal(loader, exchange, (1, 2))]

    assert whole(on_ranks(2, work)) == [list(batch) for batch in batches]


def test_the_sampler_of_rank_0_decides_and_those_of_others_are_not_asked(on_ranks: OnRanks) -> None:
    class Reversed(SequentialSampler):
        def __iter__(self) -> Iterator[int]:
            asked.append(self)
            return reversed(range(6))

    asked: list[Any] = []
    samplers: dict[int, Any] = {}

    def work(exchange: Any) -> list[list[int]]:
        dataset = Numbers(6)
        samplers[exchange.rank] = Reversed(dataset)
        return [rows_of(b) for b in deal(DataLoader(dataset, 4, sampler=samplers[exchange.rank]), exchange, (1, 1))]

    assert whole(on_ranks(2, work)) == [[5, 4, 3, 2], [1, 0]]
    assert asked == [samplers[0]]


def test_a_sampler_that_fills_one_list_again_and_again(on_ranks: OnRanks) -> None:
    class Reusing:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[list[int]]:
            batch: list[int] = []
            for first in (0, 2, 4):
                batch[:] = [first, first + 1]
                yield batch

    def work(exchange: Any) -> list[list[int]]:
        return [rows_of(b) for b in deal(DataLoader(Numbers(6), batch_sampler=Reusing()), exchange, (1, 1))]

    assert whole(on_ranks(2, work)) == [[0, 1], [2, 3], [4, 5]]


def test_a_sampler_that_never_ends_gives_as_many_batches_as_it_says(on_ranks: OnRanks) -> None:
    class Forever(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            while True:
                yield from super().__iter__()

    def work(exchange: Any) -> list[list[int]]:
        sampler = Forever(SequentialSampler(range(5)), 2, False)
        return [rows_of(b) for b in deal(DataLoader(Numbers(5), batch_sampler=sampler), exchange, (1, 1))]

    assert whole(on_ranks(2, work)) == [[0, 1], [2, 3], [4]]


def test_a_sampler_that_fails_fails_everywhere(on_ranks: OnRanks) -> None:
    class Broken(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            raise KeyError("no such bucket")

    def work(exchange: Any) -> None:
        next(iter(deal(DataLoader(Numbers(5), batch_sampler=Broken(range(5), 2, False)), exchange, (1, 1))))

    first, second = on_ranks(2, work)
    assert isinstance(first, KeyError)
    assert isinstance(second, ProcessError)
    assert str(second) == "the batch sampler of process 0 failed with KeyError: 'no such bucket'"


# Ranks without rows


def test_a_rank_without_rows_asks_nobody_for_them(on_ranks: OnRanks) -> None:
    collated: list[int] = []

    def collate(samples: list[int]) -> list[int]:
        collated.append(len(samples))
        return samples

    def work(exchange: Any) -> tuple[list[Any], list[list[int]]]:
        loader = DataLoader(Numbers(9), 4, collate_fn=collate)
        return list(deal(loader, exchange, (8, 1, 1))), loader.dataset.asked  # type: ignore[attr-defined]

    (first, _), (second, _), (third, asked) = on_ranks(3, work)
    assert first == [[0, 1], [4, 5], [8]]
    assert second == [[2], [6], NO_ROWS]
    assert third[2] is NO_ROWS
    assert asked == [[3], [7]]
    assert min(collated) == 1


def test_batches_of_one_row_go_to_the_ranks_in_turn(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> list[list[int]]:
        return [rows_of(batch) for batch in deal(make(8, batch_size=1), exchange, (1, 3))]

    first, second = on_ranks(2, work)
    assert first == [[], [1], [], [], [], [5], [], []]
    assert second == [[0], [], [2], [3], [4], [], [6], [7]]


def test_there_is_one_no_rows() -> None:
    assert copy.deepcopy([NO_ROWS])[0] is NO_ROWS
    assert pickle.loads(pickle.dumps(NO_ROWS)) is NO_ROWS
    assert repr(NO_ROWS) == "NO_ROWS"


# The copy and its original


class Halting(DataLoader[int]):
    """A loader of the user's, with a method and a way to iterate of its own."""

    doubled = 0

    def double(self) -> int:
        return 2 * self.doubled

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.doubled += 1
            yield batch


def test_the_original_stays_as_it_is(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> None:
        for kind in (DataLoader, Halting):
            loader = kind(Numbers(10), 4, collate_fn=list)
            before = dict(vars(loader))
            dealt = deal(loader, exchange, (1, 1))
            list(dealt)
            assert vars(loader) == before
            assert type(loader) is kind
            assert isinstance(dealt, kind)
            assert type(dealt).__name__ == kind.__name__
            assert dealt.dataset is loader.dataset
            assert dealt.sampler is loader.sampler
            assert dealt.collate_fn is list
            assert (dealt.batch_size, dealt.drop_last) == (4, False)
            assert (dealt.batch_sampler.batch_size, dealt.batch_sampler.drop_last) == (4, False)
            assert dealt.batch_sampler.sampler is loader.sampler
            assert not hasattr(dealt.batch_sampler, "set_epoch")
            assert list(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
            dealt.worker_init_fn = print  # as Lightning does

    assert on_ranks(2, work) == [None, None]


def test_a_class_of_the_users_keeps_its_ways(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> tuple[list[list[int]], int]:
        loader = deal(Halting(Numbers(7), 3), exchange, (1, 1))
        return [rows_of(batch) for batch in loader], loader.double()

    results = on_ranks(2, work)
    assert whole([batches for batches, _ in results]) == [[0, 1, 2], [3, 4, 5], [6]]
    assert sorted(doubled for _, doubled in results) == [4, 6]


def test_epochs_reach_the_users_sampler(on_ranks: OnRanks) -> None:
    class ByEpoch(SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([(index + self.epoch) % 5 for index in range(5)])

    def work(exchange: Any) -> list[list[int]]:
        from lightning.fabric.utilities.data import _set_sampler_epoch

        dataset = Numbers(5)
        plain = DataLoader(dataset, 5, sampler=ByEpoch(dataset))
        batched = DataLoader(dataset, batch_sampler=BatchSampler(ByEpoch(dataset), 5, False))
        found = []
        for epoch, loader in ((1, plain), (3, batched)):
            dealt = deal(loader, exchange, (1, 1))
            _set_sampler_epoch(dealt, epoch)
            found += [rows_of(batch) for batch in dealt]
        return found

    assert whole(on_ranks(2, work)) == [[1, 2, 3, 4, 0], [3, 4, 0, 1, 2]]


def test_breaking_off_and_two_iterations_at_once(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> list[list[int]]:
        loader = deal(make(6, batch_size=2), exchange, (1, 1))
        found = [rows_of(batch) for batch in islice(loader, 1)]
        one, other = iter(loader), iter(loader)
        found += [rows_of(next(iterator)) for iterator in (one, other, one, other, other, one)]
        assert next(one, None) is next(other, None) is None
        return found

    a, b, c = [0, 1], [2, 3], [4, 5]
    assert whole(on_ranks(2, work)) == [a, a, a, b, b, c, c]


def test_a_dealt_loader_is_dealt_anew(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> list[list[int]]:
        loader = deal(deal(make(8, batch_size=4), exchange, (1, 1)), exchange, (1, 3))
        return [rows_of(batch) for batch in loader]

    first, second = on_ranks(2, work)
    assert (first, second) == ([[0], [4]], [[1, 2, 3], [5, 6, 7]])


def test_persistent_workers_of_the_original_stay_with_it(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> None:
        loader = make(5, batch_size=2, num_workers=1, persistent_workers=True)
        list(loader)
        iterator = loader._iterator
        dealt = deal(loader, exchange, (1,))
        assert [rows_of(batch) for batch in dealt] == [[0, 1], [2, 3], [4]]
        assert loader._iterator is iterator
        assert dealt._iterator is not iterator

    assert on_ranks(1, work) == [None]


def test_order_is_kept_even_if_the_user_does_not_need_it(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> tuple[bool, bool]:
        loader = DataLoader(Numbers(4), num_workers=1, in_order=False)
        return loader.in_order, deal(loader, exchange, (1, 1)).in_order

    assert on_ranks(2, work) == [(False, True)] * 2


class Thinned(DataLoader[int]):
    def __iter__(self) -> Any:
        return islice(super().__iter__(), 1, None)


class Repeated(DataLoader[int]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield from (batch, batch)


class Elsewhere(DataLoader[int]):
    def __iter__(self) -> Any:
        return iter([torch.tensor([1]), torch.tensor([2])])


class Cached(DataLoader[int]):
    kept: Any = None

    def __iter__(self) -> Any:
        self.kept = self.kept or list(super().__iter__())
        return iter(self.kept)


class Stateful(DataLoader[Any]):
    """Says where it is, in a way that is of no use for a part of each batch."""

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ({"batch_size": 4, "shuffle": True}, 5),
        ({"batch_size": 1, "shuffle": True}, 19),  # most ranks have no row of most batches
        ({"batch_size": 4, "shuffle": True, "num_workers": 1}, 5),  # workers are ahead of what was given
        ({"batch_sampler": [["a", "b"], ["c"], ["d", "e", "f"]]}, 3),
    ],
)
@pytest.mark.parametrize("given_batches", [0, 2, -1])
def test_a_stateful_loader_goes_on_with_the_order_of_its_state(
    on_ranks: OnRanks, arguments: dict[str, Any], batches: int, given_batches: int
) -> None:
    given_batches %= batches + 1  # -1: all

    def loaded(exchange: Any) -> DataLoader[Any]:
        torch.manual_seed(exchange.rank)
        data: Any = Words() if "batch_sampler" in arguments else Numbers(19)
        return deal(Stateful(data, collate_fn=list, **arguments), exchange, [1.0, 2.0, 0.5])

    def rows(batch: Any) -> list[Any]:
        return [] if batch is NO_ROWS else batch

    def work(exchange: Any) -> tuple[list[Any], list[Any], int]:
        first, second = loaded(exchange), loaded(exchange)
        iterator = iter(first)
        for _ in range(given_batches):
            next(iterator)
        # A checkpoint has the state of rank 0.
        second.load_state_dict(exchange.broadcast(first.state_dict()))
        left = [rows(batch) for batch in iterator]
        return left, [rows(batch) for batch in second], len([rows(batch) for batch in second])

    for left, again, after in on_ranks(3, work):
        assert after == batches
        if given_batches % batches:
            assert again == left
        else:  # at the border of an epoch, the random state says what comes next
            assert len(again) == batches


def test_the_state_of_a_loader_that_was_not_dealt_is_refused(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> None:
        deal(Stateful(Numbers(19), batch_size=4), exchange, [1.0, 1.0]).load_state_dict({"position": 3})

    for error in on_ranks(2, work):
        assert isinstance(error, UsageError)
        assert "in one process" in str(error)


@pytest.mark.parametrize("kind", [Thinned, Repeated, Elsewhere, Cached])
def test_a_class_that_gives_other_batches_than_its_sampler(on_ranks: OnRanks, kind: type[DataLoader[int]]) -> None:
    def work(exchange: Any) -> None:
        loader = deal(kind(Numbers(6), 2), exchange, (1, 1))
        for _ in range(2):
            list(loader)

    for error in on_ranks(2, work):
        assert isinstance(error, UsageError)
        assert f"its class {kind.__name__} has a way of its own to iterate" in str(error)
        assert str(error).startswith("train_dataloader does not give one batch for every batch of its batch sampler")


# Prediction


def test_predictions_know_the_indices_of_this_rank(on_ranks: OnRanks) -> None:
    from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper

    def work(exchange: Any) -> list[list[int]]:
        plain = DataLoader(Numbers(9), 4)
        loader = DataLoader(Numbers(9), batch_sampler=_IndexBatchSamplerWrapper(plain.batch_sampler))
        dealt = deal(loader, exchange, (8, 1, 1))
        assert isinstance(dealt.batch_sampler, _IndexBatchSamplerWrapper)
        assert dealt.batch_sampler is not loader.batch_sampler
        assert dealt.batch_sampler.batch_size == 4
        for _ in range(2):
            for number, batch in enumerate(dealt):
                assert dealt.batch_sampler.seen_batch_indices[number] == rows_of(batch)
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        again = deal(dealt, exchange, (1, 1, 1))
        list(again)
        assert handed_out(again) == 3
        assert len(again.batch_sampler.seen_batch_indices) == 3
        return dealt.batch_sampler.seen_batch_indices

    assert on_ranks(3, work) == [[[0, 1], [4, 5], [8]], [[2], [6], []], [[3], [7], []]]


# Changing shares


@given(st.integers(0, 2), st.integers(0, 5), st.lists(st.integers(1, 9), min_size=2, max_size=2))
def test_shares_change_within_an_iteration(on_ranks: OnRanks, ahead: int, when: int, later: list[int]) -> None:
    def work(exchange: Any) -> tuple[list[list[int]], int]:
        shares = Shares((1, 1))
        loader = deal(make(40, batch_size=4), exchange, shares)
        found, begin = [], 0
        for number, batch in enumerate(loader):
            found.append(rows_of(batch))
            if number == when:
                # As if the workers of one rank were ahead of those of the other.
                begin = max(exchange.gather(handed_out(loader) + ahead * exchange.rank))
                shares.change(later, begin)
        return found, begin

    (first, begin), (second, _) = on_ranks(2, work)
    assert whole([first, second]) == [list(range(number, number + 4)) for number in range(0, 40, 4)]
    assert begin == when + 1 + ahead
    assert [len(rows) for rows in first[:begin]] == [2] * begin
    for number in range(begin + 1, 11):
        expected = 4 * later[0] / sum(later) * (number - begin)
        if 1 <= 4 * later[0] / sum(later) <= 3:
            assert abs(sum(len(rows) for rows in first[begin:number]) - expected) < 2


def test_workers_keep_what_they_have(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> int:
        loader = deal(make(40, batch_size=4), exchange, (1, 1))
        assert handed_out(loader) == 0
        next(iter(loader))
        return handed_out(loader)

    assert on_ranks(2, work) == [1, 1]


# The ledger


def test_the_ledger_knows_the_latest_batches_and_their_rows(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> list[Any]:
        ledger, found, kept = RowLedger(), [], []
        loader = deal(make(26, batch_size=4), exchange, (3, 1), ledger=ledger)
        for batch in loader:
            rows = ledger.of(batch)
            found.append((rows.own, rows.total))
            assert ledger.of([{"a": (batch, None)}]) == rows
            kept.append(batch)
        remembered = [batch for batch in kept if ledger.of(batch) is not None]
        assert remembered == kept[-KEPT_BATCHES:]
        assert ledger.of(torch.tensor(1)) is ledger.of({"x": [1, "a"]}) is None
        return found

    assert on_ranks(2, work) == [[(3, 4)] * 6 + [(1, 2)], [(1, 4)] * 6 + [(1, 2)]]


def test_the_ledger_forgets_loaders_that_are_gone(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> None:
        ledger = RowLedger()
        loader = deal(make(8, batch_size=4), exchange, (1, 1), ledger=ledger)
        other = deal(make(8, batch_size=4), exchange, (1, 1), ledger=ledger)
        batch, another = next(iter(loader)), next(iter(other))
        assert ledger.of(batch) == ledger.of(another) == Rows((2, 2), exchange.rank)
        del loader
        assert ledger.of(batch) is None
        assert ledger.of(another) is not None

    assert on_ranks(2, work) == [None, None]


def test_of_a_batch_that_was_given_again_the_last_time_counts() -> None:
    ledger = RowLedger()
    one, other = ledger.page("one"), ledger.page("other")
    for page, total in ((one, 1), (other, 2), (one, 3), (one, 4), (other, 5)):
        page.enter(NO_ROWS, Rows((total, 0), 1))
        assert ledger.of(NO_ROWS) == ledger.of([NO_ROWS, None]) == Rows((total, 0), 1)


def test_batches_of_several_loaders_have_to_be_shared_in_proportion(on_ranks: OnRanks) -> None:
    def work(exchange: Any) -> str:
        ledger = RowLedger()
        a = iter(deal(make(12, batch_size=4), exchange, (1, 1, 2), ledger=ledger, name="a"))
        b = iter(deal(make(18, batch_size=8), exchange, (1, 1, 2), ledger=ledger, name="b"))
        for _ in range(2):
            both = {"a": next(a), "b": next(b)}
            rows = ledger.of(both)
            assert (rows.own, rows.total) == ((1, 1, 2)[exchange.rank], 4)
        last = {"a": next(a), "b": next(b)}
        assert (last["b"] is NO_ROWS) == (exchange.rank == 1)
        with pytest.raises(UsageError) as raised:
            ledger.of(last)
        with pytest.raises(UsageError):
            ledger.of((last["b"], last["a"]))
        return str(raised.value)

    texts = on_ranks(3, work)
    assert len(set(texts)) == 1
    assert "1, 1 and 2 rows of a batch of a, and 1, 0 and 1 of one of b: not the same part of both" in texts[0]
    assert "same batch_size, with drop_last=True" in texts[0]


# Refusals


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Unsized:
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0]])


@pytest.mark.parametrize(
    ("loader", "kind", "words"),
    [
        (lambda rank: DataLoader(Stream(), 2), UnsupportedError, r"reads a stream .*use_distributed_sampler=False"),
        (lambda rank: DataLoader(Numbers(4), batch_size=None), UnsupportedError, "has batch_size=None, so it makes no"),
        (
            lambda rank: DataLoader(Numbers(4), batch_sampler=Unsized()),
            UnsupportedError,
            r"a batch sampler \(Unsized\) without a length .*Give it a __len__",
        ),
        (
            lambda rank: DataLoader(Numbers(4 + rank), 8),
            UsageError,
            "not the same number of rows in every process: process 0: 4, process 1: 5, process 2: 6. Each",
        ),
        (
            lambda rank: DataLoader(Numbers(6), 2 + rank),
            UsageError,
            "not the same number of batches in every process: process 0: 3, process 1: 2, process 2: 2",
        ),
        (lambda rank: DataLoader(Numbers(2)), UsageError, "a dataset of 2 rows for 3 processes.*Start fewer processes"),
        # One rank alone has something else: all of them say so.
        (lambda rank: DataLoader(Stream() if rank == 1 else Numbers(4)), UnsupportedError, "reads a stream"),
    ],
)
def test_what_cannot_be_dealt_is_refused_on_every_rank(
    on_ranks: OnRanks, loader: Callable[[int], DataLoader[Any]], kind: type[Exception], words: str
) -> None:
    errors = on_ranks(3, lambda exchange: deal(loader(exchange.rank), exchange, (1, 1, 1), name="val_dataloader"))
    assert {type(error) for error in errors} == {kind}
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(kind, match=f"val_dataloader .*{words}"):
        raise errors[0]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (lambda rank: (1, 1), r"3 processes need 3 shares of train_dataloader, got \(1, 1\)"),
        (lambda rank: (1, 1, 1 + rank), "the processes do not agree on the shares of train_dataloader: process 0:"),
    ],
)
def test_shares_that_do_not_fit(on_ranks: OnRanks, shares: Callable[[int], Any], words: str) -> None:
    errors = on_ranks(3, lambda exchange: deal(make(4), exchange, shares(exchange.rank)))
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(UsageError, match=words):
        raise errors[0]


def test_whether_the_user_deals() -> None:
    data = Numbers(4)
    distributed = DistributedSampler(data, num_replicas=2, rank=0)
    assert is_dealt_by_user(DataLoader(data, sampler=distributed))
    assert is_dealt_by_user(DataLoader(data, batch_sampler=BatchSampler(distributed, 2, False)))
    own = BatchSampler(SequentialSampler(data), 2, False)
    own.num_replicas, own.rank = 2, 0  # type: ignore[attr-defined]
    assert is_dealt_by_user(DataLoader(data, batch_sampler=own))
    assert not is_dealt_by_user(DataLoader(data, shuffle=True))
    assert not is_dealt_by_user(DataLoader(data, batch_size=None))
    assert not is_dealt_by_user(DataLoader(Stream()))


# Real processes


class Noted(Dataset[tuple[int, int]]):
    """Numbers, with the first random number of the worker that loads them."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, os.getpid()


class GlooExchange:
    """An `Exchange` between processes."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def broadcast(self, value: Any, source: int = 0) -> Any:
        values = [value]
        dist.broadcast_object_list(values, source)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def collate_pairs(samples: list[tuple[int, int]], sign: int) -> dict[str, list[int]]:
    assert samples, "asked to collate no rows"
    return {"rows": [sign * index for index, _ in samples], "workers": [worker for _, worker in samples]}


def begin_worker(number: int) -> None:
    assert number in (0, 1)


CASES: dict[str, dict[str, Any]] = {
    "shuffled": {"batch_size": 4, "shuffle": True},
    "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2, "prefetch_factor": 1},
    "spawned workers": {
        "batch_size": 1,
        "num_workers": 1,
        "persistent_workers": True,
        "multiprocessing_context": "spawn",
    },
    "batches of one row": {"batch_size": 1, "num_workers": 2, "prefetch_factor": 1},
    "weighted": {"batch_size": 3, "sampler": WeightedRandomSampler([1.0] * 11, 11)},
    "drawn again and again": {"batch_size": 4, "sampler": RandomSampler(range(11), True, 9), "drop_last": True},
    "subset": {"dataset": Subset(Noted(), [9, 8, 7, 6]), "batch_size": 1},
}


def loader_of(case: str) -> DataLoader[Any]:
    options = {"dataset": Noted(), "collate_fn": partial(collate_pairs, sign=-1), **CASES[case]}
    if options.get("num_workers"):
        options["worker_init_fn"] = begin_worker
    return DataLoader(**options)


def iterated(loader: Iterable[Any], seed: int) -> list[list[int]]:
    """Rows of two iterations, after one that was broken off."""
    torch.manual_seed(seed)
    found = [list(islice(loader, 2)), list(loader), list(loader)]
    return [[] if batch is NO_ROWS else batch["rows"] for part in found for batch in part]


def one_process(rank: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        exchange = GlooExchange()
        results: dict[str, Any] = {case: iterated(deal(loader_of(case), exchange, (1, 3)), seed=rank) for case in CASES}
        results["random state"] = torch.get_rng_state().tolist()
        mixed = loader_of("shuffled")
        mixed.num_workers, mixed.prefetch_factor = rank, 2 if rank else None
        iterator = iter(deal(mixed, exchange, (1, 3)))
        assert exchange.gather(rank) == [0, 1]  # not mixed up with the order, which process 1 needs already
        results["workers in process 1"] = [batch["rows"] for batch in iterator]
        shares, ledger = Shares((1, 1)), RowLedger()
        loader = deal(loader_of("batches of one row"), exchange, shares, ledger=ledger)
        rebalanced = []
        for number, batch in enumerate(loader):
            assert (ledger.of(batch).own, ledger.of(batch).total) == (int(batch is not NO_ROWS), 1)
            assert batch is NO_ROWS or os.getpid() not in batch["workers"]
            rebalanced.append([] if batch is NO_ROWS else batch["rows"])
            if number == 0:
                results["handed out"] = handed_out(loader)
                shares.change((1, 1000), max(exchange.gather(handed_out(loader))))
        results["rebalanced"] = rebalanced
    finally:
        dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    programs = [launch.Forked([__file__, str(rank), str(folder)], environment) for rank in range(PROCESSES)]
    ended = launch.wait(programs, timeout_s=2 * TIMEOUT_S)
    assert [process.code for process in ended] == [0] * PROCESSES, "\n".join(process.text for process in ended)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_real_processes_have_the_batches_of_one(results: list[dict[str, Any]], case: str) -> None:
    assert whole([rank[case] for rank in results]) == iterated(loader_of(case), seed=0)


def test_one_process_may_have_workers_and_another_none(results: list[dict[str, Any]]) -> None:
    batches = whole([rank["workers in process 1"] for rank in results])
    assert list(map(len, batches)) == [4, 4, 3]
    assert sorted(joined(batches)) == list(range(-10, 1))


def test_the_random_state_of_process_0_is_that_of_one_process(results: list[dict[str, Any]]) -> None:
    iterated(loader_of(list(CASES)[-1]), seed=0)
    assert torch.get_rng_state().tolist() == results[0]["random state"]
    assert results[1]["random state"] != results[0]["random state"]


def test_workers_keep_the_batches_that_they_have_when_shares_change(results: list[dict[str, Any]]) -> None:
    # Two for the workers of each process, which are 0, 2 and 1, 3, and one more for that which process 0 had to give.
    assert [rank["handed out"] for rank in results] == [5, 4]
    assert sorted(joined(whole([rank["rebalanced"] for rank in results]))) == [-index for index in range(10, -1, -1)]
    assert [len(rows) for rows in results[0]["rebalanced"]] == [1, 0, 1, 0, 1] + [0] * 6


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(one_process(rank, folder)))
