"""Watches the seconds of steps through a run, and plans anew where they stay away from what they were.

A device may become slower, because another program uses it too or because it is hot, and the plan is then not the best
one any more. When the median step of several windows in a row differs from what the plan took when it was adopted, one
step is recorded, the costs of each device are set right by it, and the policy is asked again. The model moves only if
that gains more than it costs, and a trial with real steps has the last word.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from torch import nn

from lightning_hetero.errors import HeteroError, UsageError
from lightning_hetero.plan import Plan
from lightning_hetero.profile.costs import ModelProfile
from lightning_hetero.runtime.engine.record import Recording
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.predict import Prediction, predict
from lightning_hetero.simulate.recalibrate import device_factors, scaled
from lightning_hetero.strategy.busy import units_only
from lightning_hetero.strategy.planning import Planning
from lightning_hetero.strategy.trial import MOST_STEPS, Trial, in_effect, warm_steps
from lightning_hetero.strategy.watch import Watch

log = logging.getLogger(__name__)

REPLAN = ("never", "auto")

WINDOW = 20  # steps of which the median is taken
DRIFT = 0.2  # part by which it has to differ
WINDOWS = 3  # in a row that have to
MOST = 3  # times that a run is planned anew, whether or not the model moves
TIMES_THE_COST = 2.0  # that a change has to gain
LEAST_GAIN = 0.05  # part of a step that it has to gain
REMEMBERED = 4  # steps before a trial that count in it


class Online(Watch):
    """What happens at the borders of steps once the first plan from measurements is adopted.

    Args:
        planning: Makes plans; knows the measured numbers of the devices.
        profile: What the model costs.
        plan: The plan that runs now.
        steps_left: How many steps are still to come.
        recording: Notes what the devices do; raises UsageError where nothing can be noted.
    """

    def __init__(
        self,
        planning: Planning,
        profile: ModelProfile,
        plan: Plan,
        *,
        steps_left: Callable[[], float],
        recording: Callable[[], AbstractContextManager[Recording]],
    ) -> None:
        super().__init__(plan)
        self._planning = planning
        self._profile = profile
        self._steps_left = steps_left
        self._record = recording
        self._drift = Drift()
        self._to_skip = 1 + warm_steps(plan)
        self._steps_s: list[float] = []
        self._block = ExitStack()
        self._recording: Recording | None = None
        self._times = 0

    def border(self, module: nn.Module) -> Plan | None:
        """Note the time, or go on with what a drift led to."""
        if self._trial is not None:
            return self._step_of(self._trial)
        if self._recording is not None:
            recording, self._recording = self._recording, None
            self._block.close()
            return self._plan_anew(recording)
        seconds = self._clock.tick()
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._steps_s.append(seconds)
        if len(self._steps_s) == WINDOW:
            median_s = statistics.median(self._steps_s)
            if self._drift.lasts(median_s):
                return self._drifted(median_s)
            self._steps_s.clear()
        return None

    def close(self) -> None:
        """End a recording that is under way."""
        self._recording = None
        self._block.close()

    def decided(self, plan: Plan) -> None:
        """Watch on, with what the plan takes now as the new measure; or stop, if it was planned often enough."""
        self._watch_on()

    def _watch_on(self) -> None:
        self.is_over = self._times >= MOST or bool(self._present.shares_of)  # replicas are not set right
        self._drift = Drift()
        self._steps_s.clear()
        self._to_skip = 1 + warm_steps(self._present)

    def _drifted(self, median_s: float) -> Plan | None:
        """Record a step, unless that cannot pay any more, or go on without one where nothing can be recorded."""
        log.info(
            "steps take %.4g s for %d windows of %d, %.4g s when the plan was adopted",
            median_s,
            WINDOWS,
            WINDOW,
            self._drift.adopted_s,
        )
        if median_s * self._steps_left() * LEAST_GAIN < self._planning.terms.time_limit_s:
            self.is_over = True  # planning takes longer than a change could gain
            return None
        try:
            self._recording = self._block.enter_context(self._record())
        except UsageError:  # connected mode: all that is known is that the step as a whole has changed
            return self._plan_anew(None)
        return None

    def _plan_anew(self, recording: Recording | None) -> Plan | None:
        self._times += 1
        begun_s = time.perf_counter()
        planning, present = self._planning, self._present
        try:
            factors = self._factors(recording)
            self._profile = scaled(self._profile, factors)
            costs, prediction = self._predicted(self._profile)
            present = replace(present, forecast=prediction.forecast)
            plans = planning.with_profile(present.optimizer_factor, self._profile)
        except Exception as error:  # whatever it is, there is a plan that works
            known = isinstance(error, HeteroError)
            log.warning("the changed speeds led to no plan, so the present one stays: %s", error, exc_info=not known)
            self._watch_on()
            return None
        planning_s = time.perf_counter() - begun_s
        worth = [plan for plan in plans if self._pays(plan, present, costs, planning_s)]
        changes = ", ".join(f"{name} takes {factor:.2f} times as long" for name, factor in factors.items())
        outcome = "another plan is tried" if worth else "no other plan is worth a change"
        log.info("costs set right (%s), planned anew in %.1f s: %s", changes, planning_s, outcome)
        if not worth:
            self._present = present
            self._watch_on()
            return None
        recent_s = self._steps_s[-REMEMBERED:]
        return self._try(Trial(present, recent_s, worth, min(MOST_STEPS, self._steps_left() / 3)))

    def _factors(self, recording: Recording | None) -> dict[str, float]:
        """How many times as long as the profile says each device in use takes."""
        if recording is None or not recording.records:
            ratio = statistics.median(self._steps_s) / self._drift.adopted_s
            return {device.name: ratio for device in self._present.used}
        _, prediction = self._predicted(units_only(self._profile))
        return device_factors(prediction.timeline, recording.timeline)

    def _predicted(self, profile: ModelProfile) -> tuple[Costs, Prediction]:
        """What the present plan takes by a profile."""
        planning, plan = self._planning, self._present
        costs = Costs(planning.graph, planning.inventory, profile, True, plan.optimizer_factor)
        return costs, predict(costs, plan.device_of, plan.execution, plan.shares_of)

    def _pays(self, plan: Plan, present: Plan, costs: Costs, planning_s: float) -> bool:
        """Whether a change to the plan gains more, over the rest of the run, than it costs."""
        if in_effect(plan) == in_effect(present):
            return False
        assert plan.forecast is not None
        assert present.forecast is not None
        gain_s = present.forecast.step_s - plan.forecast.step_s
        cost_s = migration_s(costs, present.device_of, plan.device_of) + planning_s
        return gain_s > LEAST_GAIN * present.forecast.step_s and gain_s * self._steps_left() > TIMES_THE_COST * cost_s


class Drift:
    """Tells a lasting change of the time of steps from a passing one.

    Attributes:
        adopted_s: The median of the first window.
    """

    def __init__(self) -> None:
        self.adopted_s = 0.0
        self._in_a_row = 0

    def lasts(self, median_s: float) -> bool:
        """Take the median of the next window. Whether it and those before it are off, all to the same side."""
        if not self.adopted_s:
            self.adopted_s = median_s
            return False
        ratio = median_s / self.adopted_s
        side = 1 if ratio > 1 + DRIFT else -1 if ratio < 1 / (1 + DRIFT) else 0
        self._in_a_row = self._in_a_row + side if side * self._in_a_row >= 0 and side else side
        return abs(self._in_a_row) >= WINDOWS


def migration_s(costs: Costs, before: Mapping[str, str], after: Mapping[str, str]) -> float:
    """Seconds to move parameters, gradients and the state of the optimizer from plan to plan."""
    spot = costs.devices.index
    seconds = 0.0
    for unit, state_bytes in costs.state_bytes.items():
        if before[unit] != after[unit]:
            path = costs.paths[spot(before[unit])][spot(after[unit])]
            seconds += path.latency_s + state_bytes * path.s_per_byte
    return seconds
