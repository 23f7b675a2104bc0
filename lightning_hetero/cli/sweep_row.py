"""What one job of a sweep came to, as a file of its own: jobs may run in other processes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hetero.cli.application import EXPECTED
from lightning_hetero.cli.explain import causes, explain
from lightning_hetero.errors import HeteroError, InfeasiblePlanError

if TYPE_CHECKING:
    from lightning_hetero.cli.step_clock import StepClock
    from lightning_hetero.plan import Forecast, Plan

_log = logging.getLogger(__name__)

OK = "ok"
INFEASIBLE = "infeasible"
FAILED = "failed"


@dataclass(kw_only=True)
class SweepRow:
    """One point of a sweep.

    Attributes:
        job: Its number, from 0.
        overrides: What the command line or the sweeper said for it.
        status: "ok"; "infeasible" where no plan fits; "failed".
        metric_name: What sweepers are told of: `optimized_metric`.
        metric: Its value.
        predicted_step_s: Seconds of a step by the plan's forecast.
        estimated: Whether that follows from shapes and rates of devices, and not from units that were timed.
        measured_step_s: Median seconds of a step.
        samples_per_s: Rows of the measured steps over their seconds.
        peak_bytes: Measured peak by device, where torch counts.
        predicted_peak_bytes: Predicted peak by device.
        plan_hash: The same for plans that do the same.
        reason: Why it failed.
    """

    job: int
    overrides: list[str]
    status: str = OK
    metric_name: str | None = None
    metric: float | None = None
    predicted_step_s: float | None = None
    estimated: bool | None = None
    measured_step_s: float | None = None
    samples_per_s: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    predicted_peak_bytes: dict[str, int] = field(default_factory=dict)
    plan_hash: str | None = None
    reason: str = ""

    def take(self, clock: StepClock, forecast: Forecast | None) -> None:
        """Fill in what was measured, and what was predicted."""
        self.measured_step_s, self.samples_per_s = clock.step_s, clock.samples_per_s
        self.peak_bytes = clock.peak_bytes
        self.plan_hash = None if clock.plan is None else plan_hash(clock.plan)
        if forecast is not None:
            self.predicted_step_s, self.estimated = forecast.step_s, forecast.estimated
            self.predicted_peak_bytes = {each.device: each.memory_bytes for each in forecast.devices}

    def write(self, folder: Path) -> None:
        """Leave it in a folder that all jobs of the sweep share."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2)
        temporary = folder / f".{self.job}.tmp"  # a sweep that is stopped leaves whole rows
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / f"{self.job}.json")


def failed(row: SweepRow, error: Exception, command: str) -> None:
    """Write into the row why it has no numbers; and into the log, with the traceback if it is not ours."""
    ours = next((cause for cause in causes(error) if isinstance(cause, HeteroError)), None)
    row.status = INFEASIBLE if isinstance(ours, InfeasiblePlanError) else FAILED
    expected = isinstance(error, EXPECTED)
    row.reason = explain(error, row.overrides, command) if expected else f"{type(error).__name__}: {error}"
    _log.error("job %d %s: %s", row.job, row.status, row.reason, exc_info=error if ours is None else None)


def read_rows(folder: Path) -> list[SweepRow]:
    """The rows that jobs left in a folder, in the order of their numbers."""
    found = [SweepRow(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return sorted(found, key=lambda row: row.job)


def plan_hash(plan: Plan) -> str:
    """Twelve hexadecimal digits of what a plan decides, without reasons and predictions.

    Two policies that place and run a model in the same way get the same.
    """
    decided: dict[str, Any] = {
        "stages": [
            [stage.device, stage.units, [[s.device, s.share] for s in stage.shares], stage.activation_checkpointing]
            for stage in plan.stages
        ],
        "execution": asdict(plan.execution),
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]


def varied(rows: Iterable[SweepRow]) -> list[str]:
    """The keys of which the rows do not all say the same, in the order of the command line."""
    all_said = [settings(row) for row in rows]
    keys = dict.fromkeys(key for said in all_said for key in said)
    return [key for key in keys if len({said.get(key) for said in all_said}) > 1]


def settings(row: SweepRow) -> dict[str, str]:
    """Key to value of the overrides."""
    pairs = (word.lstrip("+~").partition("=") for word in row.overrides)
    return {key: value for key, _, value in pairs}
