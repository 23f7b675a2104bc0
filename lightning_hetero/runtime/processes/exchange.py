"""Small plain data from rank to rank."""

from __future__ import annotations

from typing import Any, Protocol


class Exchange(Protocol):
    """What the processes of a run tell each other. All of them have to take part in each call, in the same order.

    Attributes:
        rank: Of this process, from 0.
        size: How many processes there are.
    """

    @property
    def rank(self) -> int:
        """See above."""

    @property
    def size(self) -> int:
        """See above."""

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, on all of them."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on all of them."""
