"""Corrects what a model costs by a step that was recorded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from lightning_hetero.errors import ProfileError
from lightning_hetero.profile.costs import Curve, ModelProfile, UnitCost
from lightning_hetero.schedule import TRANSFER, Timeline
from lightning_hetero.simulate.costs import Costs

_WORK = ("F", "B", "I", "W")


def recalibrated(costs: Costs, predicted: Timeline, recorded: Timeline, *, steps: int = 1) -> Costs:
    """The same costs with seconds scaled, device by device, so that the recorded work is predicted.

    Args:
        costs: By which the step was predicted.
        predicted: `Prediction.timeline` of the plan that ran.
        recorded: What `PlacedModel.recording` saw of it, of which moving inputs is a part.
        steps: How many steps were recorded.

    Raises:
        ProfileError: `steps` is below 1.
    """
    profile = scaled(costs.profile, device_factors(predicted, recorded, steps=steps))
    return Costs(costs.graph, costs.inventory, profile, costs.training, costs.optimizer_factor, not costs.is_coupled)


def device_factors(predicted: Timeline, recorded: Timeline, *, steps: int = 1) -> dict[str, float]:
    """How many times as long as predicted each device took; devices that did nothing are missing. See `recalibrated`.

    A profile is measured before the run, and a run is another situation: other threads compute beside it, clocks are
    throttled, somebody else uses the machine. How long each device was busy tells by how much that matters.

    Raises:
        ProfileError: `steps` is below 1.
    """
    if steps < 1:
        raise ProfileError(f"a recording holds at least 1 step, got {steps}")
    factors: dict[str, float] = {}
    took_s, work_s, moves_s = _busy_s(recorded, _WORK), _busy_s(predicted, _WORK), _busy_s(predicted, (TRANSFER,))
    for device in recorded.devices:
        computed_s = took_s[device] / steps - moves_s[device]
        if computed_s > 0 and work_s[device] > 0:
            factors[device] = computed_s / work_s[device]
    return factors


def scaled(profile: ModelProfile, factors: Mapping[str, float]) -> ModelProfile:
    """The profile of a model on devices that take `factors` times as long, by device name."""

    def curves(of: Mapping[str, Curve]) -> dict[str, Curve]:
        return {name: curve.scaled(factors.get(name, 1.0)) for name, curve in of.items()}

    def cost(unit: UnitCost) -> UnitCost:
        return replace(unit, forward_s=curves(unit.forward_s), backward_s=curves(unit.backward_s))

    return replace(profile, units=tuple(map(cost, profile.units)), own_code=cost(profile.own_code))


def _busy_s(timeline: Timeline, ops: tuple[str, ...]) -> defaultdict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for span in timeline.spans:
        if span.op in ops:
            total[span.device] += span.duration_s
    return total
