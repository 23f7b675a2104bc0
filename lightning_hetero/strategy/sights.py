"""Lets what Lightning tells about a run, and what its callbacks look at, be about all of its devices."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning_hetero.runtime.assignments import kept_beside
from lightning_hetero.strategy.device_stats import StatsOfAllDevices
from lightning_hetero.strategy.profiling import ThreadsInProfile
from lightning_hetero.strategy.pruning import PruningOverDevices
from lightning_hetero.strategy.summary import DevicesInSummary


class Sights:
    """While they are open, Lightning's summary, device monitor, torch profiler and pruning see all devices.

    What callbacks assign to `.data` of the model's parameters does not move these.

    Args:
        trainer: Whose callbacks and profiler these are.
        strategy: A HeteroStrategy, which has set up a run.
    """

    def __init__(self, trainer: Any, strategy: Any) -> None:
        plan = partial(getattr, strategy, "plan")  # which may change between two steps
        self._parts = (
            DevicesInSummary(trainer.callbacks, plan),
            StatsOfAllDevices(strategy.accelerator, trainer.callbacks, plan, strategy.host.cpu_stats),
            ThreadsInProfile(trainer.profiler, plan()),
            PruningOverDevices(trainer.callbacks, strategy.root_device),
        )
        self._kept = ExitStack()
        self._kept.enter_context(kept_beside(partial(getattr, strategy, "model")))

    def close(self) -> None:
        """Leave callbacks, accelerator and profiler as they were."""
        for part in self._parts:
            part.close()
        self._kept.close()
