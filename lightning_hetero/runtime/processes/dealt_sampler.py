"""A batch sampler that gives one process its rows of every batch of another batch sampler."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import accumulate, islice
from typing import Any

import torch
from torch.utils.data import Sampler

from lightning_hetero.errors import ProcessError
from lightning_hetero.runtime.processes.exchange import Exchange
from lightning_hetero.runtime.processes.host_generators import follow, moves_since, states
from lightning_hetero.runtime.processes.row_ledger import Rows
from lightning_hetero.schedule.dealing import Dealing, Shares


class DealtBatchSampler(Sampler[Any]):
    """This rank's rows of every batch of the user's batch sampler, without the batches of which it has none.

    Rank 0 draws the batches of an iteration, all at once, and tells the others; so the random state of one process
    decides, as if it were alone; generators of the others that stood where its own did go along. Other attributes are
    those of the user's batch sampler.

    Args:
        source: The user's batch sampler; it has a length.
        exchange: Between the ranks.
        shares: Of the ranks.

    Attributes:
        source: See above.
        turn: The iteration that began last.
        skipped: Called for every batch that is left out.
        is_joined: Asked at the beginning of an iteration: whether its batches come together with those of other
            loaders. All ranks need the same part of both then, also where one loader is shorter and begins anew.
    """

    def __init__(self, source: Any, exchange: Exchange, shares: Shares) -> None:
        self.source = source
        self.turn: Turn | None = None
        self._resumed: tuple[_Batches, int] | None = None
        self.skipped: Callable[[], None] = lambda: None
        self.is_joined: Callable[[DealtBatchSampler], bool] = lambda sampler: False
        self._exchange = exchange
        self._shares = shares

    def __iter__(self) -> Turn:
        dealing = Dealing(self._shares, carries=not self.is_joined(self))
        self.turn = Turn(self._draw, dealing, self._exchange.rank, self.skipped)
        return self.turn

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration that began last is: its order, and how many of its batches the loader has given."""
        batches, given = self._resumed or (None, 0)
        if self.turn is not None and self.turn.batches is not None:
            batches, given = self.turn.batches, self.turn.given
        if batches is None or given >= len(batches):  # the next iteration draws a new order
            return {"given": 0, "order": None}
        return {"given": given, "order": batches.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on there; on every rank."""
        order = state["order"]
        self._resumed = None if order is None else (_Batches.from_state(order), int(state["given"]))

    def __len__(self) -> int:
        """Batches of all ranks together."""
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "source" not in self.__dict__:  # while being copied, there is nothing to ask
            raise AttributeError(name)
        return getattr(self.source, name)

    @property
    def handed_out(self) -> int:
        """Batches of the iteration that began last that are dealt, those that workers are loading included."""
        return 0 if self.turn is None else len(self.turn.rows)

    def _draw(self) -> tuple[_Batches, Iterator[Any], int]:
        """The batches of an iteration, the same on every rank, what drew them, and how many of them to leave out.

        Raises:
            ProcessError: The user's batch sampler failed on rank 0, which raises its error itself.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            batches, given = resumed
            return batches, iter(()), given
        if self._exchange.rank != 0:
            failure, packed, moves = self._exchange.broadcast(None)
            if failure:
                raise ProcessError(f"the batch sampler of process 0 failed with {failure}")
            follow(moves)
            return _Batches(*packed), iter(()), 0
        before = states()
        try:
            drawn = iter(self.source)
            # As many as there are to be: a sampler may go on for ever.
            packed = _pack(islice(drawn, len(self.source)))
        except Exception as error:
            self._exchange.broadcast((f"{type(error).__name__}: {error}", None, ()))
            raise
        self._exchange.broadcast(("", packed, moves_since(before)))
        return _Batches(*packed), drawn, 0


class Turn(Iterator[Any]):
    """One iteration of a `DealtBatchSampler`.

    Attributes:
        rows: Of each batch that is dealt, in their order.
        batches: All, once they are drawn.
        given: How many of them the loader has given.
    """

    def __init__(
        self,
        draw: Callable[[], tuple[_Batches, Iterator[Any], int]],
        dealing: Dealing,
        rank: int,
        skipped: Callable[[], None],
    ) -> None:
        self.rows: list[Rows] = []
        self.given = 0
        self._draw = draw
        self._dealing = dealing
        self._rank = rank
        self._skipped = skipped
        self.batches: _Batches | None = None
        self._drawn: Iterator[Any] = iter(())

    def begin(self) -> _Batches:
        """Draw the order, if it is not drawn yet."""
        if self.batches is None:
            self.batches, self._drawn, self.given = batches, _, given = self._draw()
            self.rows = [Rows(self._dealing.deal(len(batches[number])), self._rank) for number in range(given)]
        return self.batches

    def __next__(self) -> Any:
        # Not before the first batch is asked for: a data loader first draws the seed of its workers, from the same
        # generator, and user code may draw in between.
        batches = self.begin()
        while len(self.rows) < len(batches):
            batch = batches[len(self.rows)]
            sizes = self._dealing.deal(len(batch))
            begin = sum(sizes[: self._rank])
            own = batch[begin : begin + sizes[self._rank]]
            self.rows.append(Rows(sizes, self._rank))
            if sizes[self._rank]:
                return own
            self._skipped()
        # Samplers draw from their generator at their end, too: as in one process, they learn that somebody came there.
        next(self._drawn, None)
        self._drawn = iter(())
        raise StopIteration


class _Batches(Sequence[Any]):
    """Batches of indices: integers side by side in bytes, or as they are."""

    def __init__(self, batches: list[Any] | None, indices: bytes, lengths: bytes) -> None:
        self._plain = batches
        self._indices = array("q", indices)
        self._ends = list(accumulate(array("q", lengths), initial=0))

    def state(self) -> Any:
        """For a checkpoint: plain data and tensors."""
        if self._plain is not None:
            return self._plain
        ends = torch.tensor(self._ends, dtype=torch.int64)
        return {"indices": torch.tensor(self._indices.tolist(), dtype=torch.int64), "lengths": ends.diff()}

    @classmethod
    def from_state(cls, state: Any) -> _Batches:
        """The same batches."""
        if not isinstance(state, dict):
            return cls(state, b"", b"")
        indices, lengths = (array("q", state[key].tolist()).tobytes() for key in ("indices", "lengths"))
        return cls(None, indices, lengths)

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._plain is None else len(self._plain)

    def __getitem__(self, number: Any) -> Any:
        if self._plain is not None:
            return self._plain[number]
        return self._indices[self._ends[number] : self._ends[number + 1]].tolist()


def _pack(drawn: Iterator[Any]) -> tuple[list[Any] | None, bytes, bytes]:
    """What `_Batches` is made of."""
    # Lists are copied, as a sampler may fill the same one again and again.
    batches = [batch if _can_be_cut(batch) else list(batch) for batch in map(_copied, drawn)]
    if all(type(batch) is list and all(type(index) is int for index in batch) for batch in batches):
        try:
            indices = array("q", [index for batch in batches for index in batch])
        except OverflowError:  # beyond 64 bits
            return batches, b"", b""
        return None, indices.tobytes(), array("q", map(len, batches)).tobytes()
    return batches, b"", b""


def _copied(batch: Any) -> Any:
    return batch.copy() if isinstance(batch, list) else batch


def _can_be_cut(batch: Any) -> bool:
    return isinstance(batch, Sized) and hasattr(batch, "__getitem__") and not isinstance(batch, dict)
