"""A recorded step corrects the seconds of a profile."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.devices import DeviceSpec, Inventory, Link
from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.plan.forecast import Execution
from lightning_hetero.profile import Curve, Flow, Line, ModelProfile, UnitCost
from lightning_hetero.schedule import Timeline
from lightning_hetero.simulate import Costs, predict, recalibrated

FACTORS = st.floats(0.2, 5.0)
NAMES = ("a:0", "b:0", "c:0")


def costs(works: list[float]) -> Costs:
    """A chain of units that take so many seconds for each row, forward and backward together, on three devices."""
    devices = (DeviceSpec(name=name, kind=name[0], torch_device=name, memory_bytes=1 << 30) for name in NAMES)
    links = (Link(source=a, target=b, bandwidth_bytes_per_s=1e3, latency_s=0.0) for a, b in permutations(NAMES, 2))
    names = [f"net.{index}" for index in range(len(works))]
    units = tuple(
        UnitCost(
            name=name,
            forward_s=dict.fromkeys(NAMES, Curve(((1, seconds / 3),))),
            backward_s=dict.fromkeys(NAMES, Curve(((1, 2 * seconds / 3),))),
        )
        for name, seconds in zip(names, works, strict=True)
    )
    sizes: dict[str, Any] = {"parameters": 10, "parameter_bytes": 40, "trainable_bytes": 40, "buffer_bytes": 0}
    graph = ModelGraph(units=tuple(Unit(name=name, kind="Linear", tied_to=name, **sizes) for name in names))
    flows = [Flow(source=a, target=b, chained=True, size_bytes=Line(0.0, 10.0)) for a, b in pairwise(names)]
    return Costs(
        graph=graph,
        inventory=Inventory(devices=tuple(devices), links=tuple(links)),
        profile=ModelProfile(model=graph.fingerprint, rows=8, units=units, flows=tuple(flows)),
    )


def cut_after_the_first(there: Costs) -> dict[str, str]:
    return {name: "b:0" if spot else "a:0" for spot, name in enumerate(there.graph.names)}


def forward(micro_batches: int) -> Execution:
    return Execution(micro_batches=micro_batches, schedule="forward")


def slower(timeline: Timeline, factors: dict[str, float]) -> Timeline:
    """What would be recorded if devices computed so many times as long; moving is a part of the work there."""
    spans = [
        replace(span, start_s=10 * span.start_s, duration_s=span.duration_s * factors.get(span.device, 1.0))
        if span.op in ("F", "B")
        else replace(span, start_s=10 * span.start_s, op="F")
        for span in timeline.spans
        if span.op in ("F", "B", "transfer")
    ]
    return Timeline(tuple(spans), timeline.devices)


def seconds(there: Costs, unit: int, device: str) -> tuple[float, float]:
    cost = there.profile.units[unit]
    return cost.forward_s[device](4), cost.backward_s[device](4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.1, 3.0), min_size=2, max_size=4), FACTORS, FACTORS, st.integers(2, 4))
def test_devices_that_took_longer_are_predicted_to_take_longer(
    works: list[float], one: float, other: float, micro_batches: int
) -> None:
    there = costs(works)
    place = cut_after_the_first(there)
    factors = {"a:0": one, "b:0": other}
    predicted = predict(there, place, forward(micro_batches)).timeline
    found = recalibrated(there, predicted, slower(predicted, factors))
    for device, factor in {**factors, "c:0": 1.0}.items():  # the third one did nothing
        for unit in range(len(works)):
            before, after = seconds(there, unit, device), seconds(found, unit, device)
            assert after == pytest.approx([factor * value for value in before])


def test_a_step_as_predicted_changes_nothing() -> None:
    there = costs([1.0, 2.0, 3.0])
    place = cut_after_the_first(there)
    predicted = predict(there, place, forward(4))
    again = predict(recalibrated(there, predicted.timeline, slower(predicted.timeline, {})), place, forward(4))
    assert again.forecast.step_s == pytest.approx(predicted.forecast.step_s)


def test_several_steps_count_as_their_mean() -> None:
    there = costs([1.0, 1.0])
    predicted = predict(there, cut_after_the_first(there), forward(2)).timeline
    once = slower(predicted, {})
    twice = Timeline((*once.spans, *(replace(s, start_s=s.start_s + 1e3) for s in once.spans)), once.devices)
    found = recalibrated(there, predicted, twice, steps=2)
    assert seconds(found, 0, "a:0") == pytest.approx(seconds(there, 0, "a:0"))
    with pytest.raises(ProfileError, match="a recording holds at least 1 step, got 0"):
        recalibrated(there, predicted, twice, steps=0)
