"""What stands in the place of an engine's threads once they have ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from lightning_hetero.runtime.engine.threads import Threads

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.region import RegionCall


class EndedThreads(Threads):
    """Threads that refuse the backward of a call from before their end.

    Args:
        threads: Those that have ended.
        running: Calls whose backward is under way.
    """

    def __init__(self, threads: Threads, running: Iterable[RegionCall]) -> None:
        self.__dict__.update(vars(threads))
        self._running = running

    @property
    def pool(self) -> NoReturn:
        """No lanes any more.

        Raises:
            RuntimeError: Always.
        """
        for call in list(self._running):
            call.abandon()
        raise RuntimeError(
            "this graph was made in micro-batches, by devices whose threads have ended since: the run is over, or its "
            "model stands elsewhere now. Call backward before that."
        )
