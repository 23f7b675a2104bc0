"""Corrects what a model costs by a step that was recorded."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from lightning_hetero.errors import ProfileError
from lightning_hetero.profile.costs import Curve, UnitCost
from lightning_hetero.schedule import TRANSFER, Timeline
from lightning_hetero.simulate.costs import Costs

_WORK = ("F", "B", "I", "W")


def recalibrated(costs: Costs, predicted: Timeline, recorded: Timeline, *, steps: int = 1) -> Costs:
    """The same costs with the seconds of units scaled, device by device, so that the recorded work is predicted.

    A profile is measured before the run, and a run is another situation: other threads compute beside it, clocks are
    throttled, somebody else uses the machine. How long each device was busy tells by how much that matters. Devices
    that did nothing in the recorded step keep their seconds.

    Args:
        costs: By which the step was predicted.
        predicted: `Prediction.timeline` of the plan that ran.
        recorded: What `PlacedModel.recording` saw of it, of which moving inputs is a part.
        steps: How many steps were recorded.

    Raises:
        ProfileError: `steps` is below 1.
    """
    if steps < 1:
        raise ProfileError(f"a recording holds at least 1 step, got {steps}")
    factors: dict[str, float] = {}
    took_s, work_s, moves_s = _busy_s(recorded, _WORK), _busy_s(predicted, _WORK), _busy_s(predicted, (TRANSFER,))
    for device in costs.devices:
        computed_s = took_s[device] / steps - moves_s[device]
        if computed_s > 0 and work_s[device] > 0:
            factors[device] = computed_s / work_s[device]
    units = tuple(
        replace(unit, forward_s=_scaled(unit, factors, "forward_s"), backward_s=_scaled(unit, factors, "backward_s"))
        for unit in costs.profile.units
    )
    return Costs(
        costs.graph, costs.inventory, replace(costs.profile, units=units), costs.training, costs.optimizer_factor
    )


def _busy_s(timeline: Timeline, ops: tuple[str, ...]) -> defaultdict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for span in timeline.spans:
        if span.op in ops:
            total[span.device] += span.duration_s
    return total


def _scaled(unit: UnitCost, factors: dict[str, float], which: str) -> dict[str, Curve]:
    return {device: curve.scaled(factors.get(device, 1.0)) for device, curve in getattr(unit, which).items()}
