"""Exchanges in the middle of a forward or backward, each of which says where its sender is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.errors import ProcessError

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is, when it takes part in an exchange.

    Attributes:
        norm: Index of the module.
        step: How many steps there were before this one.
        call: How many calls of such modules there were, in all of them.
        records: Whether that call will have a backward with an exchange.
        in_backward: Whether in that backward.
    """

    norm: int
    step: int
    call: int
    records: bool
    in_backward: bool = False

    def said(self, names: Sequence[str]) -> str:
        """In words."""
        where = "the backward" if self.in_backward else "the forward"
        recording = "" if self.records else ", whose input needs no gradient"
        return f"{where} of {names[self.norm]} (step {self.step}, call {self.call}{recording})"


class Rounds:
    """Exchanges of statistics: messages of one size, each of which says where its sender is.

    gloo joins whatever the processes send next, so only the messages can tell if they belong together. All are sent to
    all, for sums too: so every process sees who is where, and adds in the same order.

    Args:
        group: The group of torch.
        rank: Of this process.
        size: How many processes there are.
        step: How many there were before this one.
        calls: Numbers for calls of modules.
        names: Of the modules.
        width: Most numbers in a message.

    Attributes:
        waited_s: Seconds that this process has spent in them, waiting for others included.
    """

    _HEAD = 6

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        rank: int,
        size: int,
        step: int,
        calls: Iterator[int],
        names: Sequence[str],
        width: int,
    ) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self._step = step
        self._calls = calls
        self._names = names
        self._width = width
        self._lock = threading.Lock()  # autograd has a thread for each accelerator
        self.waited_s = 0.0

    def next_call(self, norm: int, records: bool) -> Place:
        """The next call of a module.

        Args:
            norm: Index of the module.
            records: Whether the call will have a backward with an exchange.
        """
        return Place(norm, self._step, next(self._calls), records)

    def gather(self, place: Place, count: int, values: Tensor) -> list[tuple[int, Tensor]]:
        """Counts and values of all processes, in the order of their ranks.

        Args:
            place: Where this process is.
            count: Rows of values.
            values: float64 on the host, shape (numbers,).

        Raises:
            ProcessError: Others are elsewhere, or do not answer.
        """
        own = torch.zeros(self._HEAD + self._width, dtype=torch.float64, device=_HOST)
        head = (*astuple(place), count)  # all exact as float64
        own[: self._HEAD] = torch.tensor(head, dtype=torch.float64, device=_HOST)
        own[self._HEAD : self._HEAD + len(values)] = values
        rows = [torch.empty_like(own) for _ in range(self._size)]
        try:
            with self._lock:
                begun_s = time.perf_counter()
                dist.all_gather(rows, own, self._group)
                self.waited_s += time.perf_counter() - begun_s
        except RuntimeError as error:
            raise ProcessError(
                f"process {self._rank} of {self._size} got no answer in {place.said(self._names)}. Batch normalisation "
                "needs rows of all processes in every step. The error of torch: " + str(error).splitlines()[0]
            ) from error
        heads = [row[: self._HEAD].long().tolist() for row in rows]
        places = [Place(norm, step, call, bool(records), bool(back)) for norm, step, call, records, back, _ in heads]
        if any(other != place for other in places):
            said = ", ".join(f"process {rank} is in {each.said(self._names)}" for rank, each in enumerate(places))
            raise ProcessError(
                f"the processes are not at the same batch normalisation: {said}. Their statistics do not belong "
                "together. Every process has to run the same modules in the same order, in forward and backward."
            )
        kept = slice(self._HEAD, self._HEAD + len(values))
        return [(count, row[kept]) for (*_, count), row in zip(heads, rows, strict=True)]
