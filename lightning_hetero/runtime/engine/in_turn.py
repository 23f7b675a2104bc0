"""Random numbers of micro-batches that run one after the other: each draws what it would draw in a lane.

So a step that is a rehearsal has the numbers of any other step, and a run that resumes goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.engine.state import saves_otherwise, stays_in_its_thread
from lightning_hetero.runtime.engine.streams import Generator, Generators, derive


class _HasDevice(Protocol):
    @property
    def torch_device(self) -> torch.device: ...


class Draws(Protocol):
    """A unit, as far as its random numbers go."""

    @property
    def worker(self) -> _HasDevice:
        """The thread of its device."""


class InTurn:
    """Sets the generators of one step, piece by piece, and leaves them as they were.

    What lanes have no numbers of their own for comes from where it would come anyway: what is drawn on another device
    than one's own, or in a unit whose forward may run again.

    Args:
        generators: The default generators of all devices of the plan, that of the root first.
        seed: Where the numbers of the step begin.
    """

    def __init__(self, generators: Generators, seed: int) -> None:
        self._generators = generators
        self._root = next(iter(generators.of))
        self._seed = seed
        self._index = self._calls = self._depth = 0

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Within the block, code of the step itself draws the numbers of a micro-batch."""
        self._index, self._calls = index, 0
        with _seeded(self._generators.of[self._root], derive(self._seed, index)):
            yield

    @contextmanager
    def unit(self, unit: Draws, inputs: Any) -> Iterator[None]:
        """Within the block, a unit draws the numbers of this call of it; units in it share them."""
        number = self._calls
        is_call = not self._depth and stays_in_its_thread() is None
        self._calls += is_call
        self._depth += 1
        try:
            if is_call and not saves_otherwise():
                seed = derive(self._seed, self._index, 1 + number)
                # Without a graph nothing will run again, so nobody has to make a seed for that.
                nothing_again = nullcontext() if torch.is_grad_enabled() else frames.random_numbers_arranged()
                with _seeded(self._generators.of[unit.worker.torch_device], seed), nothing_again:
                    yield
            else:
                yield
        finally:
            self._depth -= 1


@contextmanager
def _seeded(generator: Generator, seed: int) -> Iterator[None]:
    # Without its lock: nobody else draws meanwhile, and a backward in the block may take it.
    before = generator.get()
    generator.seed(seed)
    try:
        yield
    finally:
        generator.set(before)
