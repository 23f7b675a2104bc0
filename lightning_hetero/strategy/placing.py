"""The plan of a run in effect: what is placed by it, and when it gives way to another one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.plan import Plan
from lightning_hetero.plan.forecast import FORWARD, WHOLE
from lightning_hetero.profile import ModelProfile
from lightning_hetero.runtime.engine.record import Recording
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.held import Held
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import PlacedModel
from lightning_hetero.runtime.reconcile import DeviceReconciler
from lightning_hetero.schedule import get_schedule
from lightning_hetero.strategy.busy import BusyTable, busy_table
from lightning_hetero.strategy.first_steps import MEASURE_AND_PLAN_S, FirstSteps, steps_left
from lightning_hetero.strategy.online import Online
from lightning_hetero.strategy.optimizers import (
    StateFollows,
    check_optimizers,
    exchange_parameters,
    keep_state_beside_parameters,
)
from lightning_hetero.strategy.planning import Planning
from lightning_hetero.strategy.precision import use_devices
from lightning_hetero.strategy.report import print_plan, save_plan
from lightning_hetero.strategy.resume import ResumingCore
from lightning_hetero.strategy.spreading import SpreadingCore
from lightning_hetero.strategy.step_values import StepValues
from lightning_hetero.strategy.steps import RECORDED
from lightning_hetero.strategy.trial import in_effect
from lightning_hetero.strategy.watch import Watch
from lightning_hetero.strategy.watchdog import Watchdog

log = logging.getLogger(__name__)


class PlacingCore(ResumingCore, SpreadingCore):
    """What a strategy needs to put plans into effect, during a run too."""

    _replan: str
    _plan: Plan | None = None
    _placed: PlacedModel | None = None
    _reconciler: DeviceReconciler | None = None
    _stepper: Stepper | None = None
    _step_values: StepValues  # of metrics, for the stepper
    _watch: Watch | None = None  # of steps, which may change the plan between them
    _waiting: tuple[Plan, Held] | None = None  # what is to run once nobody holds parameters
    _followers: StateFollows | None = None  # from the first change of plan in a run to its end
    _watchdog: Watchdog | None = None  # over the first steps, which do not run as the plan has them
    _measured: tuple[Planning, ModelProfile] | None = None
    _shown: object = None  # what was printed last
    _log_dir: str | None = None

    # What users may ask

    @property
    def plan(self) -> Plan | None:
        """The plan of the latest run; None before the first."""
        return self._plan

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Within the block, note which device does what, and when; see `PlacedModel.recording`.

        Raises:
            UsageError: No run is going on, or nothing of it runs in micro-batches.
        """
        if self._placed is None:
            raise UsageError("no run is going on, so there is nothing to record; call it from a hook of the run")
        with self._placed.recording() as recording:
            yield recording

    def forecast_against_measured(self, recording: Recording, steps: int = 1) -> BusyTable:
        """Seconds that each device was predicted to work on its units in a step, and those that it took.

        Args:
            recording: From `recording()`, after its block.
            steps: How many steps it saw.

        Raises:
            UsageError: The model was not measured in this run.
        """
        if self._measured is None or self._plan is None:
            raise UsageError(
                "the model was not measured in this run, so nothing was predicted; set profile='always', and ask after "
                "the first steps"
            )
        return busy_table(*self._measured, self._plan, recording.timeline, steps)

    # Placing

    def _planning(self, fitting: bool) -> Planning:
        assert self.model is not None
        assert self._inventory is not None
        self._release(None)
        return self._planning_of(self.model, self._inventory, training=fitting)

    def _place(self, plan: Plan) -> None:
        """Put a plan into effect, or go over from another one to it."""
        assert self.model is not None
        plan = self._completed(plan)
        if self._team is not None and (note := self._team.note(training=plan.training)) not in plan.notes:
            plan = replace(plan, notes=(*plan.notes, note))
        previous, self._plan = self._plan, plan
        if self._placed is not None and previous is not None and in_effect(previous) == in_effect(plan):
            return
        self._release(None)
        self._placed = self._to_place(self.model, plan)
        use_devices(self._precision_plugin, map(torch.device, plan.torch_devices), self.host.mixed_precision)
        self._placed.place()
        exchange_parameters(self.optimizers, self._placed.replaced)
        self.host.update_properties(self.model, device=self.root_device)

    def _release(self, device: torch.device | None) -> None:
        """Undo `_place`; the tensors stay where they are unless a device is given."""
        stepper, self._stepper = self._stepper, None
        if stepper is not None:
            stepper.close()
        reconciler, self._reconciler = self._reconciler, None
        if reconciler is not None:
            deactivate(reconciler)
        placed, self._placed = self._placed, None
        try:
            if placed is not None:
                exchange_parameters(self.optimizers, placed.release(device))
        finally:
            if device is not None:  # the run is over
                self._end_following()

    def _end_following(self) -> None:
        self._waiting = None
        followers, self._followers = self._followers, None
        if followers is not None:
            followers.close()

    def _show(self, trainer: Any) -> None:
        plan = self._plan
        assert plan is not None
        if trainer.fast_dev_run:
            return
        shown, self._shown = self._shown, in_effect(plan)
        if self._verbose and shown != self._shown:
            if len(plan.used) > 1:
                print_plan(plan)
            else:
                log.info("%s", " ".join(plan.notes))
        if self._log_dir is not None and self.is_global_zero:
            save_plan(plan, Path(self._log_dir))

    def _check(self) -> None:
        """Refuse what cannot work over the devices of the plan."""
        check_optimizers(self.optimizers, alone=self._team is None)

    def _begin(self, fitting: bool) -> None:
        """What a placed model needs before it runs."""
        assert self._placed is not None
        if fitting:
            keep_state_beside_parameters(self.optimizers)
            if self._team is not None and self.model is not None:
                module: Any = self.lightning_module
                self._team.gradients.attach(self.model, is_manual=not module.automatic_optimization)
        self._reconciler = self._placed.reconciler()
        if self._reconciler is not None:
            activate(self._reconciler)
        self._stepper = self._make_stepper() if fitting else None

    def _change(self, plan: Plan, trainer: Any) -> None:
        """Go over to another plan at the border between two steps.

        Raises:
            UnsupportedError: A callback or optimizer cannot work over its devices; the plan is in effect all the same.
        """
        before = self._placed
        self._place(plan)
        if self._placed is not before:
            self._begin(fitting=True)
            self._lead_on()
        self._check()

    def _lead_on(self) -> None:
        """Let optimizers that only user code knows follow the parameters too."""
        assert self.model is not None
        if self._followers is None:
            self._followers = StateFollows(self.model)
        self._followers.moved()

    def _confining(self, batch: Any) -> AbstractContextManager[None]:
        """Keep a batch on trusted devices, and see, within the block, which units get it, for the plan to be made."""
        confinement, watch = self._pipelining.confinement, self._watch
        if confinement is None:
            return nullcontext()
        confinement.watch(batch)
        if self.model is None or not isinstance(watch, FirstSteps) or watch.profile is not None:
            return nullcontext()
        return confinement.noting(self.model, watch.planning.graph.names)

    def _make_stepper(self) -> Stepper | None:
        """What runs training steps in micro-batches; None if they run once on the whole batch."""
        placed = self._placed
        if placed is None or placed.engine is None or placed.plan.execution.schedule in (WHOLE, FORWARD):
            return None
        module = self.lightning_module
        if module is None or self.model is not module or not module.automatic_optimization:
            return None
        schedule = get_schedule(placed.plan.execution.schedule)
        self._step_values = StepValues()
        metrics = placed.layout.metrics
        return Stepper(placed.engine, module, "training_step", schedule, RECORDED, metrics, self._step_values.note)

    # Other plans

    def _guarded(self, doing: str, more_s: float = 0.0) -> AbstractContextManager[None]:
        """Within the block, what hangs in the first steps is noticed."""
        return nullcontext() if self._watchdog is None else self._watchdog.over(doing, more_s)

    def _dismiss_watchdog(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.close()

    def _go_on(self, watch: Watch) -> None:
        """What the steps so far have to say before the next one."""
        module: Any = self.lightning_module
        plan = new = self._next_plan(watch, module if self.model is None else self.model)
        while plan is not None:
            try:
                self._change(plan, module.trainer)
                break
            except UnsupportedError as error:
                plan = watch.refused(error)
        if new is not None and watch.is_settled:
            self._show(module.trainer)
        if watch.is_over and self._waiting is None:
            self._dismiss_watchdog()
            self._watch = self._after(watch, module.trainer)

    def _next_plan(self, watch: Watch, model: nn.Module) -> Plan | None:
        """The plan to go over to; None to stay, which may be because user code holds parameters."""
        assert self._plan is not None
        if self._waiting is None:
            with self._guarded("measuring and planning after the first steps", MEASURE_AND_PLAN_S):
                plan = watch.border(model)
            if plan is None or not self._matters_who_holds(plan):
                return plan
            devices = map(torch.device, (*self._plan.torch_devices, *plan.torch_devices))
            self._waiting = plan, Held(model, devices)
        plan, held = self._waiting
        reason = held.reason()
        if reason and not held.is_in_vain:
            return None
        self._waiting = None
        if reason:
            watch.stays(self._plan, reason)
            return self._plan  # nobody has shown it yet if a trial came to it
        return plan

    def _matters_who_holds(self, plan: Plan) -> bool:
        """Whether a graph over the parameters would not survive a change to the plan."""
        assert self._plan is not None
        assert self._placed is not None
        if in_effect(self._plan) == in_effect(self._completed(plan)):
            return False
        is_cut = self._placed.engine is not None and self._placed.engine.cut_calls > 0  # its threads end
        return is_cut or len({*self._plan.torch_devices, *plan.torch_devices}) > 1

    def _after(self, watch: Watch, trainer: Any) -> Watch | None:
        """What goes on watching when one is through."""
        if not isinstance(watch, FirstSteps) or watch.profile is None:
            return None
        self._measured = (watch.planning, watch.profile)
        assert self._plan is not None
        if self._replan == "never" or not watch.planning.is_by_time or self._plan.shares_of:
            return None
        left = partial(steps_left, trainer)
        return Online(watch.planning, watch.profile, self._plan, steps_left=left, recording=self.recording)

    def __getstate__(self) -> dict[str, Any]:
        of_a_run = ("_placed", "_reconciler", "_stepper", "_watch", "_waiting", "_followers", "_watchdog", "_measured")
        return {**super().__getstate__(), **dict.fromkeys(of_a_run)}
