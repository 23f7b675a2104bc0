"""Watches the first steps of training, measures the model on every device, and plans anew with what that says.

The first steps run as the first plan has them, which knows nothing but sizes; user code runs no more often than it
would otherwise. Two steps are timed, one is recorded, and before the next one begins each unit is measured alone on
each device. The plans that this leads to are tried with real steps, beside the first one, and the fastest stays.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_hetero.devices import Inventory
from lightning_hetero.devices.measured import measured_inventory
from lightning_hetero.errors import InfeasiblePlanError, UnsupportedError
from lightning_hetero.placement import Constraints
from lightning_hetero.placement.constraints import may_run
from lightning_hetero.plan import Plan
from lightning_hetero.profile import ModelProfile
from lightning_hetero.profile.cache import ProfileCache, cache_key
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.runtime.confinement import Confinement
from lightning_hetero.runtime.engine.stepper import Look, look_away
from lightning_hetero.strategy.planning import Planning
from lightning_hetero.strategy.trial import MOST_STEPS, TIMED, Trial, warm_steps
from lightning_hetero.strategy.watch import Watch

log = logging.getLogger(__name__)

PROFILE = ("auto", "always", "never")

WORTH_S = 120.0  # seconds that the rest of a run has to last for "auto": measuring and planning take up to a sixth
MEASURE_S = 10.0
MEASURE_AND_PLAN_S = 120.0  # far more than devices, model and all policies together take, on any machine
CALL_OVERHEAD_S = 250e-6  # of the runtime for a call of a stage; see benchmarks/overhead.py
TRIAL_SHARE = 1 / 3  # of the steps to come that a trial may take


class FirstSteps(Watch):
    """What happens at the border before each of the first steps.

    Args:
        planning: Makes plans.
        first: The plan that runs now.
        factor: Bytes of optimizer state for each byte of trained parameter.
        always: Whether to plan anew however short the run is.
        steps_left: How many steps are still to come.
        device_profile: File with measured numbers of the devices; None measures them.
        confinement: What saw which units get the batch; None if all devices are trusted.

    Attributes:
        planning: Makes plans; knows the measured numbers of the devices, once there are any.
        profile: What the model costs, once it is measured.
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
        confinement: Confinement | None = None,
    ) -> None:
        super().__init__(first)
        self.planning = planning
        self._factor = factor
        self._always = always
        self._steps_left = steps_left
        self._device_profile = device_profile
        self._confinement = confinement
        self._steps_s: list[float] = []
        self._recording: Recording | None = None
        self._is_recorded = False
        self._parts = 1.0  # of the batch, as large as what was recorded
        self.profile: ModelProfile | None = None

    def border(self, module: nn.Module) -> Plan | None:
        """Time, record, plan anew, or go on with the trial."""
        if self._trial is not None:
            return self._step_of(self._trial)
        if self._recording is not None:
            recording, self._recording = self._recording, None
            return self._plan_anew(recording)
        self._steps_s.append(self._clock.tick(self._present.torch_devices))
        warm = 1 + warm_steps(self._present)  # nothing ends where the first one begins
        if len(self._steps_s) < warm + TIMED:
            return None
        del self._steps_s[:warm]
        is_worth_it = min(self._steps_s) * self._steps_left() >= WORTH_S
        if self._always or (is_worth_it and not torch.are_deterministic_algorithms_enabled()):
            self._recording = Recording(module, self.planning.graph)
            return None
        if is_worth_it:
            log.info(
                "the first plan stays, as Trainer(deterministic=True) asks for the same numbers in every run, and a "
                "plan chosen by the clock may be another one next time; name one (plan='plan.json', placement='even'), "
                "or say profile='always'"
            )
        self.is_over = True
        return None

    @property
    def needs_whole_step(self) -> bool:
        """Whether the next step is recorded by hooks, which must see whole batches."""
        return self._recording is not None and not self._is_recorded

    @contextmanager
    def around_step(self, parts: float = 1.0) -> Iterator[Look]:
        """What the step's forward has to run in. If it cannot be recorded, it runs all the same.

        Args:
            parts: How many times as many rows the step has as what runs in the block.
        """
        self._parts = parts
        recording, self._is_recorded = None if self._is_recorded else self._recording, self._recording is not None
        with ExitStack() as stack:
            if recording is not None:  # once: some optimizers call the step several times
                try:
                    stack.enter_context(recording)
                except Exception as error:
                    log.warning("the model cannot be measured, so the first plan stays: %s", error, exc_info=True)
                    self._recording, self.is_over = None, True
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            yield look_away if recording is None else recording.ends_in
            slept_s = time.perf_counter() - wall_s - (time.thread_time() - cpu_s)
        if recording is not None and any(device.emulated for device in self._present.used):
            # Devices that the CPU plays sleep behind their last unit, which looks as if own code took so long.
            recording.own_code_s = max(0.0, recording.own_code_s - slept_s)

    def decided(self, plan: Plan) -> None:
        """All is done."""
        self.is_over = True

    def _plan_anew(self, recording: Recording) -> Plan | None:
        begun_s = time.perf_counter()
        constraints = self.planning.terms.constraints
        used = [d.name for d in self.planning.inventory.trainable if d.name not in constraints.forbidden]
        names = ", ".join(used)
        log.info("the model is measured on %s, to plan anew; this takes some seconds", names)
        try:
            inventory = _measured(self.planning.inventory, constraints.forbidden, self._device_profile)
            self.planning = self.planning.on(inventory)
            seen = () if self._confinement is None else self._confinement.seen_by
            profile = _profile_of(recording, inventory, constraints, seen)
            self.profile = replace(profile, rows=round(profile.rows * self._parts))
            plans = self.planning.with_profile(self._factor, self.profile)
            foreseen = self.planning.foreseen(self._present, self._factor, self.profile)
        except Exception as error:  # whatever it is, there is a plan that works
            known = isinstance(error, (InfeasiblePlanError, UnsupportedError))
            log.warning("no plan was made from measurements, so the first one stays: %s", error, exc_info=not known)
            self.is_over = True
            return None
        log.info("measured the model on its devices and planned anew in %.1f s", time.perf_counter() - begun_s)
        if foreseen is None:
            log.info("the first plan is given up: with activations, it takes more memory than a device may give")
        self._present = foreseen or self._present
        if not self.planning.is_by_time:  # seconds are not what counts
            self.is_over = True
            return plans[0]
        most_steps = min(MOST_STEPS, TRIAL_SHARE * self._steps_left())
        return self._try(Trial(self._present, self._steps_s, plans, most_steps, first_may_stay=foreseen is not None))


def _measured(inventory: Inventory, forbidden: Collection[str], device_profile: Path | None) -> Inventory:
    """The inventory with measured numbers; forbidden devices are not touched, but for the root, which has own code."""
    left_out = {d.name for d in inventory if d.name in forbidden and not d.emulated} - {inventory.root.name}
    used = tuple(device for device in inventory if device.name not in left_out)
    links = tuple(link for link in inventory.links if not left_out & {link.source, link.target})
    found = measured_inventory(replace(inventory, devices=used, links=links), profile=device_profile)
    devices = tuple(device if device.name in left_out else found[device.name] for device in inventory)
    others = tuple(link for link in inventory.links if left_out & {link.source, link.target})
    return replace(found, devices=devices, links=(*found.links, *others))


def _profile_of(
    recording: Recording,
    inventory: Inventory,
    constraints: Constraints | None = None,
    seen_by: Collection[str] = (),
) -> ModelProfile:
    """Measure, or take from the cache.

    Args:
        recording: Of a step.
        inventory: The devices.
        constraints: Rules for every policy.
        seen_by: Names of modules that were given the batch in other steps.
    """
    seen = {unit for unit in recording.graph.names for name in seen_by if f"{unit}.".startswith(f"{name}.")}
    sees_batch = (*recording.sees_batch, *recording.out_of_sight, *seen)
    may = may_run(recording.graph, constraints or Constraints(), sees_batch)
    cache, key = ProfileCache(), cache_key(recording, inventory, rows=recording.rows, training=True, may_run=may)
    profile = cache.get(key)
    if profile is None:
        budget_s, overhead_s = MEASURE_S, CALL_OVERHEAD_S
        profile = measure_model(recording, inventory, budget_s=budget_s, call_overhead_s=overhead_s, may_run=may)
        cache.put(key, profile)
    return replace(profile, sees_batch=(*profile.sees_batch, *sorted(seen - {*profile.sees_batch})))


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
