"""Stages as a pipeline: a thread each, and micro-batches that follow each other through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from torch import Tensor

Values = dict[str, Tensor]
"""What a micro-batch has by now: arguments and the outputs of the stages before, by name."""
Step = Callable[[Values], Values]


class Pipeline:
    """Runs steps one after the other on each micro-batch, and different micro-batches at the same time.

    Several threads may call it; their micro-batches wait for each other at every stage.

    Args:
        steps: What the stages do.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)
        self._threads: list[ThreadPoolExecutor] = []

    def run(self, micro_batches: Sequence[Values]) -> list[Values]:
        """Run all steps on every micro-batch.

        Raises:
            Exception: What a step raised first; later stages skip that micro-batch.
        """
        if len(micro_batches) == 1 or len(self._steps) == 1:  # nothing to overlap
            return [self._straight(values) for values in micro_batches]
        ends = [self.submit(values) for values in micro_batches]
        errors = [end.exception() for end in ends]  # waits for all, so that nothing runs on after an error
        error = next((error for error in errors if error is not None), None)
        if error is not None:
            raise error
        return [end.result() for end in ends]

    def submit(self, values: Values) -> Future[Values]:
        """Send a micro-batch on its way, behind those that were sent before."""
        if not self._threads:
            self._threads = [ThreadPoolExecutor(1, f"hetero-export-{index}") for index in range(len(self._steps))]
        ready: Future[Values] = Future()
        ready.set_result(values)
        for thread, step in zip(self._threads, self._steps, strict=True):
            ready = thread.submit(partial(_after, ready, step))
        return ready

    def close(self) -> None:
        """End the threads."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.shutdown()

    def _straight(self, values: Values) -> Values:
        for step in self._steps:
            values = step(values)
        return values


def _after(before: Future[Values], step: Step) -> Values:
    return step(before.result())
