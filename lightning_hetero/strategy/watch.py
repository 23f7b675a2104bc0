"""What watches the steps of a run from border to border, and may change the plan between two of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lightning_hetero.plan import Plan
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.profile.clock import synchronize
from lightning_hetero.runtime.engine.stepper import Look, look_away
from lightning_hetero.strategy.trial import Trial

log = logging.getLogger(__name__)

FAR_OFF = 0.25  # part of the prediction by which a step may differ from it without a warning


class StepClock:
    """Measures from border to border. A change of plans belongs to the step that follows it."""

    def __init__(self) -> None:
        self._begun_s = time.perf_counter()

    def tick(self, wait_for: Iterable[str] = ()) -> float:
        """Seconds since the border before.

        Args:
            wait_for: Devices of torch that have to be through with their work.
        """
        for device in wait_for:
            synchronize(torch.device(device))
        begun_s, self._begun_s = self._begun_s, time.perf_counter()
        return self._begun_s - begun_s


class Watch:
    """Between two steps it may hand over another plan, and it runs trials of several.

    Args:
        present: The plan that runs now.

    Attributes:
        is_over: Whether nothing is left to do.
        is_settled: Whether the plan that runs now is the one that stays for the time being.
    """

    def __init__(self, present: Plan) -> None:
        self.is_over = False
        self._present = present
        self._clock = StepClock()
        self._trial: Trial | None = None

    @property
    def is_settled(self) -> bool:
        """Whether no trial is under way."""
        return self._trial is None

    def border(self, module: nn.Module) -> Plan | None:
        """A step is about to begin. Returns the plan that it is to run with; None leaves the present one.

        Args:
            module: The placed model.
        """
        return None if self._trial is None else self._step_of(self._trial)

    @property
    def needs_whole_step(self) -> bool:
        """Whether the next step must not be cut into micro-batches."""
        return False

    @contextmanager
    def around_step(self, parts: float = 1.0) -> Iterator[Look]:
        """What the step's forward has to run in. Gives what is to see the step's result.

        Args:
            parts: How many times as many rows the step has as what runs in the block.
        """
        yield look_away

    def refused(self, error: Exception) -> Plan:
        """A new plan cannot run. Returns the one to run with instead."""
        log.warning("a plan that was made from measurements cannot run, so it is left out: %s", error)
        if self._trial is None:
            return self._present
        self._trial.drop()
        return self._end(self._trial) if self._trial.is_over else self._trial.plan

    def stays(self, plan: Plan, reason: str) -> None:
        """The plan that runs now cannot be left any more, so nothing else is tried."""
        log.warning("the present plan stays, though another one was to run, because %s", reason)
        self._trial, self._present, self.is_over = None, plan, True

    def close(self) -> None:
        """The run ends here, whatever is under way."""

    def decided(self, plan: Plan) -> None:
        """A trial is over, and this plan stays."""

    def _try(self, trial: Trial) -> Plan:
        """Begin a trial. Returns the plan to run with."""
        self._clock.tick()
        if trial.is_over:
            return self._end(trial)
        self._trial = trial
        return trial.plan

    def _step_of(self, trial: Trial) -> Plan | None:
        before = trial.plan
        trial.took(self._clock.tick(before.torch_devices))
        if trial.is_over:
            return self._end(trial)
        return None if trial.plan is before else trial.plan

    def _end(self, trial: Trial) -> Plan:
        """The plan that stays, with the verdict among its notes; the log gets the verdict and any surprise."""
        self._trial = None
        words, winner = trial.verdict(), trial.winner
        plan = winner.plan
        if words:
            log.info("%s", words)
            plan = replace(plan, notes=(*plan.notes, words))
            if plan.forecast is not None and abs(winner.typical_s / plan.forecast.step_s - 1) > FAR_OFF:
                log.warning(
                    "a step takes %s, predicted were %s; the data loader, callbacks and loggers are not predicted",
                    format_seconds(winner.typical_s),
                    format_seconds(plan.forecast.step_s),
                )
        self._present = plan
        self.decided(plan)
        return plan
