"""What the devices of a run do, sent to its loggers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from lightning_hetero.errors import UsageError
from lightning_hetero.plan import Plan
from lightning_hetero.profile.clock import synchronize
from lightning_hetero.runtime.engine.record import Recording
from lightning_hetero.runtime.meter import Meter, metering
from lightning_hetero.strategy._compat import steps_taken
from lightning_hetero.strategy.core import HeteroStrategyCore


class HeteroMonitorCore:
    """Callback that logs what the devices do in a training step: `Trainer(callbacks=[HeteroMonitor()])`.

    Every so many steps, one of them is watched, and every logger of the Trainer gets

    - `hetero/step_s`: its seconds, from the first hook to the last, after all devices are through;
    - `hetero/predicted_step_s`: those of the plan's forecast, if it has one;
    - `hetero/bubble_share`: which part of the devices' time is idle, and `hetero/busy_share/<device>`: which part of
      the time each works, both of the time from the first task of a device to the last. For plans whose devices
      work in micro-batches; where one runs after the other there is nothing to compare;
    - `hetero/moved_MB`: millions of bytes of tensors that moved between devices, batch and optimizer included;
    - `hetero/memory_MB/<device>`: the most that torch held on each accelerator since the step that was watched before.

    To watch a step costs some microseconds for each task of a device, and waits for the devices at its end.

    Args:
        every_n_steps: How often; None: as often as the Trainer logs (`log_every_n_steps`).

    Raises:
        UsageError: `every_n_steps` is no whole number from 1 on; when a run begins, the Trainer has no loggers, or
            another strategy.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
            raise UsageError(f"every_n_steps={every_n_steps!r} must be a whole number from 1 on, or None")
        self._every = every_n_steps
        self._block = ExitStack()
        self._meter: Meter | None = None  # while a step is watched
        self._recording: Recording | None = None
        self._begun_s = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what there is nothing to watch in."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, HeteroStrategyCore):
            raise UsageError(
                "HeteroMonitor watches the devices of strategy='hetero', but this Trainer has "
                f"{type(trainer.strategy).__name__}. Set the strategy, or leave the callback out."
            )
        if not trainer.loggers and not trainer.fast_dev_run:
            raise UsageError(
                "HeteroMonitor sends what it sees to the Trainer's loggers, and there are none. Give it one, such as "
                "logger=CSVLogger('logs'), or leave the callback out."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to watch, if it is time to."""
        every = self._every or trainer.log_every_n_steps
        if not trainer.loggers or not every or (steps_taken(trainer) + 1) % every:
            return
        strategy = trainer.strategy
        try:
            self._recording = self._block.enter_context(strategy.recording())
        except UsageError:  # connected mode, or somebody else records
            self._recording = None
        self._meter = self._block.enter_context(metering())
        self._begun_s = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Send what was seen."""
        meter, self._meter = self._meter, None
        if meter is None:
            return
        plan: Plan = trainer.strategy.plan
        for device in plan.torch_devices:
            synchronize(torch.device(device))
        step_s = time.perf_counter() - self._begun_s
        self._block.close()
        metrics = {"hetero/step_s": step_s, "hetero/moved_MB": meter.moved_bytes / 1e6, **_memory(plan)}
        if plan.forecast is not None:
            metrics["hetero/predicted_step_s"] = plan.forecast.step_s
        if self._recording is not None and self._recording.records:
            timeline = self._recording.timeline
            metrics["hetero/bubble_share"] = timeline.bubble_share
            metrics |= {f"hetero/busy_share/{device}": share for device, share in timeline.utilisation.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=steps_taken(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The step does not end."""
        self._meter = None
        self._block.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nor does it here."""
        self._meter = None
        self._block.close()


def _memory(plan: Plan) -> Mapping[str, float]:
    """Peak of each accelerator in use, by the name of the metric; counted anew from now on."""
    found = {}
    for device in plan.used:
        place = torch.device(str(device.torch_device))
        if place.type == "cpu":
            continue
        module = torch.get_device_module(place)
        try:
            found[f"hetero/memory_MB/{device.name}"] = module.max_memory_allocated(place.index or 0) / 1e6
            module.reset_peak_memory_stats(place.index or 0)
        except (AttributeError, NotImplementedError):  # not every backend counts
            continue
    return found
