"""Watches the first steps of training, measures the model on every device, and plans anew with what that says.

The first steps run as the first plan has them, which knows nothing but sizes; user code runs no more often than it
would otherwise. Two steps are timed, one is recorded, and before the next one begins each unit is measured alone on
each device. If the new plan turns out to be slower than the first one was, the first one comes back.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_hetero.devices import Inventory
from lightning_hetero.devices.measured import measured_inventory
from lightning_hetero.errors import InfeasiblePlanError, UnsupportedError
from lightning_hetero.plan import Plan
from lightning_hetero.profile import ModelProfile
from lightning_hetero.profile.cache import ProfileCache, cache_key
from lightning_hetero.profile.clock import synchronize
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.strategy.planning import Planning

log = logging.getLogger(__name__)

PROFILE = ("auto", "always", "never")

WORTH_S = 120.0  # seconds that the rest of a run has to last for "auto": measuring and planning take up to a sixth
MEASURE_S, SEARCH_S = 10.0, 10.0
CALL_OVERHEAD_S = 250e-6  # of the runtime for a call of a stage; see benchmarks/overhead.py
FAR_OFF = 0.25  # part of the prediction by which a step may differ from it without a warning
_TIMED = 2  # steps of each plan
_WARM, _WARM_AGAIN = 1, 4  # steps that come before: cutting a region is tried out in the first ones


class FirstSteps:
    """What happens at the border before each of the first steps.

    Args:
        planning: Makes plans.
        first: The plan that runs now.
        factor: Bytes of optimizer state for each byte of trained parameter.
        always: Whether to plan anew however short the run is.
        steps_left: How many steps are still to come.
        device_profile: File with measured numbers of the devices; None measures them.

    Attributes:
        is_over: Whether nothing is left to do.
    """

    def __init__(
        self,
        planning: Planning,
        first: Plan,
        factor: float,
        *,
        always: bool,
        steps_left: Callable[[], float],
        device_profile: Path | None = None,
    ) -> None:
        self._planning = planning
        self._first = first
        self._factor = factor
        self._always = always
        self._steps_left = steps_left
        self._device_profile = device_profile
        self._recording: Recording | None = None
        self._is_recorded = False
        self._begun_s: list[float] = []
        self._first_s = math.inf
        self._second: Plan | None = None
        self.is_over = False

    def border(self, module: nn.Module) -> Plan | None:
        """A step is about to begin. Returns the plan that it is to run with; None leaves the present one.

        Args:
            module: The placed model.
        """
        if self._recording is not None and self._second is None:
            recording, self._recording = self._recording, None
            return self._plan_anew(recording)
        self._note_time()
        warm = _WARM if self._second is None else _WARM_AGAIN
        if len(self._begun_s) <= warm + _TIMED:
            return None
        seconds = min(end_s - begin_s for begin_s, end_s in pairwise(self._begun_s[warm:]))
        if self._second is not None:
            return self._judge(seconds)
        self._first_s = seconds
        if self._always or seconds * self._steps_left() >= WORTH_S:
            self._recording = Recording(module, self._planning.graph)
        else:
            self.is_over = True
        return None

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """What the step's forward has to run in. If it cannot be recorded, it runs all the same."""
        recording, self._is_recorded = None if self._is_recorded else self._recording, self._recording is not None
        with ExitStack() as stack:
            if recording is not None:  # once: some optimizers call the step several times
                try:
                    stack.enter_context(recording)
                except Exception as error:
                    log.warning("the model cannot be measured, so the first plan stays: %s", error, exc_info=True)
                    self._recording, self.is_over = None, True
            yield

    def refused(self, error: Exception) -> Plan:
        """The new plan cannot run. Returns the one that ran before."""
        log.warning("the plan that was made from measurements cannot run, so the first one stays: %s", error)
        self.is_over = True
        return self._first

    def _note_time(self) -> None:
        for device in (self._second or self._first).torch_devices:
            synchronize(torch.device(device))
        self._begun_s.append(time.perf_counter())

    def _plan_anew(self, recording: Recording) -> Plan | None:
        begun_s = time.perf_counter()
        try:
            inventory = measured_inventory(self._planning.inventory, profile=self._device_profile)
            profile = _profile_of(recording, inventory)
            plan = self._planning.on(inventory).with_profile(self._factor, profile, SEARCH_S)
        except Exception as error:  # whatever it is, there is a plan that works
            known = isinstance(error, (InfeasiblePlanError, UnsupportedError))
            log.warning("no plan was made from measurements, so the first one stays: %s", error, exc_info=not known)
            self.is_over = True
            return None
        log.info("measured the model on its devices and planned anew in %.1f s", time.perf_counter() - begun_s)
        if (plan.device_of, plan.execution) == (self._first.device_of, self._first.execution):
            self.is_over = True
        self._second, self._begun_s = plan, []
        return plan

    def _judge(self, seconds: float) -> Plan | None:
        """Whether the second plan keeps its promise."""
        self.is_over = True
        assert self._second is not None
        forecast = self._second.forecast
        if seconds > self._first_s:
            log.warning(
                "a step takes %.4g s with the plan made from measurements, and %.4g s with the first, which comes back",
                seconds,
                self._first_s,
            )
            return self._first
        if forecast is not None and abs(seconds / forecast.step_s - 1) > FAR_OFF:
            log.warning(
                "a step takes %.4g s, predicted were %.4g s; the data loader, callbacks and loggers are not predicted",
                seconds,
                forecast.step_s,
            )
        return None


def _profile_of(recording: Recording, inventory: Inventory) -> ModelProfile:
    cache, key = ProfileCache(), cache_key(recording, inventory, rows=recording.rows, training=True)
    profile = cache.get(key)
    if profile is None:
        profile = measure_model(recording, inventory, budget_s=MEASURE_S, call_overhead_s=CALL_OVERHEAD_S)
        cache.put(key, profile)
    return profile


def steps_left(trainer: Any) -> float:
    """Batches that a fit has still to train on, as far as its limits say; infinity if they do not."""
    batches = float(trainer.num_training_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - trainer.current_epoch
    by_epochs = batches * epochs if batches and epochs else 0.0
    steps = trainer.max_steps
    by_steps = math.inf if steps in (None, -1) else (steps - trainer.global_step) * trainer.accumulate_grad_batches
    return min(by_epochs, by_steps)


def can_gain(planning: Planning, wanted: str) -> bool:
    """Whether another plan than the first could be made at all."""
    return wanted != "never" and not planning.is_fixed and len(planning.inventory.trainable) > 1
