"""Lets Lightning's PyTorchProfiler see what the devices do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch._C._profiler import _ExperimentalConfig

from lightning_hetero.plan import Plan
from lightning_hetero.strategy._compat import TorchProfilerOptions

log = logging.getLogger(__name__)


class ThreadsInProfile:
    """While it is open, the report of a PyTorchProfiler has what the workers of the devices do.

    All threads are recorded; by default torch sees the one alone that started the profiler. And where the plan cuts
    batches, modules get no hooks: hooks would see parts of a batch, so the run to profile would be another one, in
    which nothing is cut. The names of stages take the place of those of modules. What users configured stays.

    Args:
        profiler: Of the Trainer; others than PyTorchProfiler are left alone.
        plan: The plan that is in effect.
    """

    def __init__(self, profiler: Any, plan: Plan | None) -> None:
        self._undo: list[Callable[[], None] | None] = []
        options = TorchProfilerOptions.of(profiler)
        if options is None or plan is None:
            return
        self._undo.append(options.configure(_ExperimentalConfig(profile_all_threads=True)))
        if plan.execution.micro_batches > 1 and len(plan.used) > 1:
            undo = options.forgo_module_names()
            if undo is not None:
                log.info("The profiler names stages, as in hetero/stage1/F3, and not modules, so that batches are cut.")
            self._undo.append(undo)

    def close(self) -> None:
        """Leave the profiler as it was."""
        for undo in self._undo:
            if undo is not None:
                undo()
