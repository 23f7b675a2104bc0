"""What devices were to do in a step, beside what they did: the prediction of a plan against a recording of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_hetero.plan import Plan
from lightning_hetero.plan.explain import format_seconds, text_table
from lightning_hetero.profile.costs import OWN_CODE, ModelProfile, UnitCost
from lightning_hetero.schedule import Timeline
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.predict import predict
from lightning_hetero.strategy.planning import Planning


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """What one device does with the units that stand on it, in one step, transfers included.

    Attributes:
        device: Its name.
        predicted_s: Seconds that the profile makes of it.
        measured_s: Seconds that its worker took.
    """

    device: str
    predicted_s: float
    measured_s: float


class BusyTable(tuple[Busy, ...]):
    """One row for each device of a plan, in the order of the inventory; as text, a table."""

    def __str__(self) -> str:
        rows = [(row.device, format_seconds(row.predicted_s), format_seconds(row.measured_s)) for row in self]
        return text_table(("device", "predicted busy", "measured busy"), rows)


def busy_table(planning: Planning, profile: ModelProfile, plan: Plan, measured: Timeline, steps: int) -> BusyTable:
    """Compare a recording of some steps with their prediction.

    The model's own code and the optimizer are in neither: recordings see units only.

    Args:
        planning: Has the devices as the profile means them.
        profile: What the model costs.
        plan: What ran.
        measured: Of one step or more.
        steps: How many it was.
    """
    bare = units_only(profile)
    costs = Costs(planning.graph, planning.inventory, bare, planning.training, plan.optimizer_factor)
    predicted_s = _of_units(predict(costs, plan.device_of, plan.execution, plan.shares_of).timeline)
    measured_s = _of_units(measured)
    return BusyTable(
        Busy(
            device=device.name,
            predicted_s=predicted_s.get(device.name, 0.0),
            measured_s=measured_s.get(device.name, 0.0) / steps,
        )
        for device in plan.used
    )


def units_only(profile: ModelProfile) -> ModelProfile:
    """The profile without the model's own code, which recordings do not see."""
    return replace(profile, own_code=UnitCost(name=OWN_CODE))


def _of_units(timeline: Timeline) -> Mapping[str, float]:
    seconds: dict[str, float] = {}
    for span in timeline.spans:
        if span.stage is not None:
            seconds[span.device] = seconds.get(span.device, 0.0) + span.duration_s
    return seconds
