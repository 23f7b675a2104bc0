"""How many rows of a batch this process has, and how many the whole batch has, for every batch that a loader gives."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lightning_hetero.errors import UnsupportedError, UsageError

KEPT_BATCHES = 4
"""How many batches of each loader are remembered. Lightning reads one ahead at most, and each one kept costs memory."""


_NOTHING = (
    "this process has no rows of this batch, and had none in this pass over the data so far, so nobody knows what an "
    "empty batch looks like for a hook that looks into it. A batch has to have at least as many rows as there are "
    "processes to have one for each: raise batch_size, or start fewer processes."
)


class NoRows:
    """What a loader gives in place of a batch of which this process has no rows. There is one, `NO_ROWS`.

    It may be handed on. Code that looks into it, as into a batch, gets an error that says why there is nothing.
    """

    def __iter__(self) -> Iterator[Any]:
        raise UnsupportedError(_NOTHING)

    def __len__(self) -> int:
        raise UnsupportedError(_NOTHING)

    def __bool__(self) -> bool:
        return True  # it is no batch of length 0

    def __getitem__(self, key: object) -> Any:
        raise UnsupportedError(_NOTHING)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NOTHING)  # what looks whether there is such an attribute goes on without

    def __repr__(self) -> str:
        return "NO_ROWS"

    def __reduce__(self) -> str:
        return "NO_ROWS"  # a global name: copies, pickled ones too, are the same object


NO_ROWS: Final = NoRows()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a batch.

    Attributes:
        sizes: Those of each process.
        rank: Of this process.
        loader: Name of the loader; empty if none is known.
    """

    sizes: tuple[int, ...]
    rank: int
    loader: str = field(default="", compare=False)

    @property
    def own(self) -> int:
        """Those of this process."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """Those of all processes."""
        return sum(self.sizes)

    def in_proportion_to(self, other: Rows) -> bool:
        """Whether every process has the same part of both batches; all processes find the same."""
        pairs = zip(self.sizes, other.sizes, strict=True)
        return all(ours * other.total == theirs * self.total for ours, theirs in pairs)


class Page:
    """What a ledger knows of one loader; it goes when the loader goes.

    Attributes:
        name: Of the loader, for messages.
    """

    def __init__(self, name: str, numbers: Iterator[int]) -> None:
        self.name = name
        self._numbers = numbers
        # Batches are kept, not only their ids, which would be somebody else's after their death.
        self._entries: deque[tuple[int, Any, Rows]] = deque(maxlen=KEPT_BATCHES)

    def enter(self, batch: object, rows: Rows) -> None:
        """Remember a batch, and forget what the loader gave long before."""
        self._entries.append((next(self._numbers), batch, rows))

    def find(self, batch: object) -> list[tuple[int, Rows]]:
        """When the loader gave it, by a number that grows, and the rows that it had then."""
        return [(number, rows) for number, entered, rows in self._entries if entered is batch]


class RowLedger:
    """Remembers the rows of the latest batches of all loaders, by the identity of the batch."""

    def __init__(self) -> None:
        self._pages: weakref.WeakSet[Page] = weakref.WeakSet()
        self._numbers = itertools.count()

    def page(self, name: str) -> Page:
        """A new page, which lives as long as somebody else keeps it."""
        page = Page(name, self._numbers)
        self._pages.add(page)
        return page

    def of(self, batch: object) -> Rows | None:
        """Rows of a batch, or of the batches in a dict, list or tuple of several; None if no loader gave it.

        Raises:
            UsageError: Several loaders gave it, and a process has a larger part of one batch than of another.
        """
        found = list(self._found(batch))
        if not found:
            return None
        (first, rows), *others = found
        for name, other in others:
            if not rows.in_proportion_to(other):
                raise UsageError(
                    f"the processes have {_listed(rows)} rows of a batch of {first}, and {_listed(other)} of one of "
                    f"{name}: not the same part of both. The step takes means over the rows of both, and those of all "
                    "processes together would not be those of one process. Give these loaders the same batch_size, "
                    "with drop_last=True."
                )
        return replace(rows, loader=first)

    def _found(self, batch: object) -> Iterator[tuple[str, Rows]]:
        """Name of a loader and rows, for each batch in there."""
        # One object may have been given more than once, as `NO_ROWS` is: the last time counts.
        hits = [(number, page.name, rows) for page in self._pages for number, rows in page.find(batch)]
        if hits:
            _, name, rows = max(hits, key=lambda hit: hit[0])
            yield name, rows
        elif isinstance(batch, Mapping):
            for value in batch.values():
                yield from self._found(value)
        elif isinstance(batch, (list, tuple)):
            for value in batch:
                yield from self._found(value)


def _listed(rows: Rows) -> str:
    return ", ".join(map(str, rows.sizes[:-1])) + f" and {rows.sizes[-1]}" if len(rows.sizes) > 1 else str(rows.own)
