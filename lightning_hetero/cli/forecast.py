"""What the steps of a job should have taken, for plans that were made without a forecast."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

from omegaconf import open_dict

from lightning_hetero.cli.planner import Planner
from lightning_hetero.errors import HeteroError
from lightning_hetero.plan import Forecast
from lightning_hetero.strategy.planning import FromFilePolicy

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_hetero.cli.step_clock import StepClock

_log = logging.getLogger(__name__)


def forecast_of(cfg: DictConfig, clock: StepClock) -> Forecast | None:
    """The forecast of the plan that a job trained with.

    A run that measured its first steps has one. For the others it is made as `lightning-hetero plan measure=true`
    makes it: operations and bytes by shapes, rates of devices by a clock.

    Args:
        cfg: The configuration `train` of the job.
        clock: What watched it.

    Returns:
        The forecast; None without a plan, or where nothing can be said about the model.
    """
    plan, example = clock.plan, clock.example
    if plan is None or plan.forecast is not None or example is None:
        return None if plan is None else plan.forecast
    wider = copy.deepcopy(cfg)
    with open_dict(wider):
        wider.update(rows=example.rows, training=True, optimizer=plan.optimizer_factor, dtype="float32", measure=True)
        wider.devices.memory = None  # a step that was taken did fit
    try:
        return Planner(wider, policy=FromFilePolicy(plan), example=example).plan().plans[0].forecast
    except HeteroError:
        return None
    except Exception:  # of the user's model, built once more without memory: the job itself has succeeded
        _log.warning("no prediction for this job", exc_info=True)
        return None
