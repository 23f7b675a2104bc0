"""Sums that run in the background, one after the other, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_hetero.errors import ProcessError

Signature = Sequence[tuple[str, tuple[int, ...], str]]
"""Name, shape and dtype of each parameter."""


class Sums:
    """Sums of tensors over the ranks of a group. All ranks start the same ones in the same order.

    Args:
        group: For tensors in host memory, and for plain data.
        between_devices: For tensors on accelerators, of the same ranks; None if there are none.

    Attributes:
        lost: The first failure. Nothing can be summed afterwards: the ranks are out of step.
    """

    def __init__(self, group: dist.ProcessGroup | None, between_devices: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._between_devices = between_devices
        self._works: dict[int, dist.Work] = {}
        self.lost: ProcessError | None = None

    @property
    def started(self) -> frozenset[int]:
        """The numbers of all that have been started since `forget`."""
        return frozenset(self._works)

    def start(self, number: int, tensor: Tensor) -> None:
        """Replace a tensor by its sum, in the background.

        Raises:
            ProcessError: Another process does not answer, as far as is known now.
        """
        with self._answered():
            group = self._group if tensor.is_cpu else self._between_devices
            work = dist.all_reduce(tensor, group=group, async_op=True)
        assert work is not None
        self._works[number] = work

    def wait(self) -> None:
        """Wait for all sums. For those on accelerators, what this thread launches there waits.

        Raises:
            ProcessError: Another process does not answer.
        """
        with self._answered():
            for number in sorted(self._works):
                self._works[number].wait()

    def forget(self) -> None:
        """Drop all sums, without waiting for those that still run."""
        self._works.clear()

    def gather(self, value: object) -> list[Any]:
        """The plain data of all ranks, in their order, on all of them.

        Raises:
            ProcessError: Another process does not answer.
        """
        values: list[Any] = [None] * dist.get_world_size(self._group)
        with self._answered():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn what torch raises when others do not answer into one error, which stays."""
        try:
            yield
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
            self.lost = ProcessError(
                f"process {rank} of {size} got no answer during the sum of gradients: another process went away, "
                "did not answer in time, or sums other gradients. Look at the messages of the other processes for the "
                f"first error, then start all of them again. The error of torch: {str(error).splitlines()[0]}"
            )
            raise self.lost from error


def difference(everyone: Sequence[Signature]) -> str:
    """The first parameter that is not the same on all ranks, in words."""
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        for index in range(max(len(first), len(theirs))):
            one, other = (_described(side, index) for side in (first, theirs))
            if one != other:
                return (
                    f"the processes have different parameters: number {index} is {one} in process 0, and {other} in "
                    f"process {rank}. Build the same model in every process."
                )
    return "the processes send their gradients in buckets of different sizes. Give all of them the same bucket_bytes."


def _described(signature: Signature, index: int) -> str:
    if index >= len(signature):
        return "nothing"
    name, shape, dtype = signature[index]
    return f"{name}, {dtype} of shape {shape}"
