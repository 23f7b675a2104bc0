"""Predictions of plans: closed forms, and what must hold for any model, plan and inventory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.devices import DeviceSpec, Inventory, Link
from lightning_hetero.errors import PlacementError, ProfileError
from lightning_hetero.graph import ModelGraph, Unit
from lightning_hetero.plan.forecast import Execution
from lightning_hetero.profile import Curve, Flow, Line, ModelProfile, UnitCost
from lightning_hetero.schedule.rows import split_rows
from lightning_hetero.simulate import Costs, predict

GIB = 1 << 30
NAMES = ("a:0", "b:0", "c:0")


def inventory(speeds: tuple[float, ...] = (1.0, 1.0, 1.0), bytes_per_s: float = 1e12) -> Inventory:
    devices = tuple(
        DeviceSpec(name=name, kind=name[0], memory_bytes=GIB, torch_device=name, speed=speed)
        for name, speed in zip(NAMES, speeds, strict=False)
    )
    links = tuple(
        Link(source=a.name, target=b.name, bandwidth_bytes_per_s=bytes_per_s, latency_s=0.0)
        for a in devices
        for b in devices
        if a is not b
    )
    return Inventory(devices=devices, links=links)


def costs(
    seconds: tuple[float, ...],
    *,
    rows: int = 8,
    there: Inventory | None = None,
    size_bytes: float = 0.0,
    saved_bytes: float = 0.0,
    chained: bool = True,
    **profile: Any,
) -> Costs:
    """A chain of units; the forward of a row takes so many seconds on a device of speed 1, the backward twice that."""
    there = there or inventory()
    names = [f"net.{index}" for index in range(len(seconds))]
    units = tuple(
        UnitCost(
            name=name,
            forward_s={d.name: Curve(((1, each / d.speed),)) for d in there},
            backward_s={d.name: Curve(((1, 2 * each / d.speed),)) for d in there},
            saved_bytes=Line(0.0, saved_bytes),
        )
        for name, each in zip(names, seconds, strict=True)
    )
    flow = {"size_bytes": Line(0.0, size_bytes)}
    flows = [Flow(source=a, target=b, chained=chained, **flow) for a, b in pairwise(names)]
    graph = ModelGraph(
        units=tuple(
            Unit(
                name=name, kind="Linear", parameters=10, parameter_bytes=40, trainable_bytes=40, buffer_bytes=0,
                tied_to=name,
            )
            for name in names
        )
    )  # fmt: skip
    return Costs(
        graph=graph,
        inventory=there,
        profile=ModelProfile(model=graph.fingerprint, rows=rows, units=units, flows=tuple(flows), **profile),
    )


def dealt(costs: Costs, *counts: int) -> dict[str, str]:
    """So many units to each device, in order."""
    devices = [device for device, count in zip(costs.devices, counts, strict=False) for _ in range(count)]
    return dict(zip(costs.graph.names, devices, strict=True))


def forward(micro_batches: int, rematerialize: bool = False) -> Execution:
    return Execution(micro_batches=micro_batches, schedule="forward", rematerialize=rematerialize)


def test_whole_is_the_sum_of_everything() -> None:
    there = costs((1.0, 2.0, 3.0))
    assert predict(there, dealt(there, 1, 1, 1), Execution()).forecast.step_s == pytest.approx(8 * 3 * 6.0)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_equal_stages_take_as_many_turns_as_micro_batches_and_stages_less_one(micro_batches: int) -> None:
    there = costs((1.0, 1.0, 1.0))
    found = predict(there, dealt(there, 1, 1, 1), forward(micro_batches) if micro_batches > 1 else Execution())
    turn_s = 8 / micro_batches * 3.0
    assert found.forecast.step_s == pytest.approx((micro_batches + 2) * turn_s)


def test_one_forward_one_backward_keeps_one_micro_batch_more_than_there_are_stages() -> None:
    there = costs((1.0, 1.0), rows=64, saved_bytes=1000.0)
    peaks = {}
    for schedule in ("1f1b", "gpipe"):
        found = predict(there, dealt(there, 1, 1), Execution(micro_batches=16, schedule=schedule))
        peaks[schedule] = found.forecast.devices[1].memory_bytes
    kept = {name: (peak - min(peaks.values())) / 4000 for name, peak in peaks.items()}
    assert kept["gpipe"] >= 16 - 3


def test_rematerialization_takes_a_forward_more_and_keeps_less() -> None:
    there = costs((1.0, 1.0), rows=64, saved_bytes=1e6)
    keeps, again = (predict(there, dealt(there, 1, 1), forward(16, each)).forecast for each in (False, True))
    assert again.step_s > keeps.step_s
    assert again.devices[0].memory_bytes < keeps.devices[0].memory_bytes / 3


def test_a_step_ends_with_the_optimizers_one_after_the_other() -> None:
    there = costs((1.0, 1.0), optimizer_s_per_byte={"a:0": 1.0, "b:0": 2.0, "c:0": 3.0})
    without = costs((1.0, 1.0))
    place = dealt(there, 1, 1)
    added_s = predict(there, place, Execution()).forecast.step_s - predict(without, place, Execution()).forecast.step_s
    assert added_s == pytest.approx(40 * 1.0 + 40 * 2.0)


def test_tensors_pass_through_the_root_unless_they_are_in_a_chain() -> None:
    there = inventory(bytes_per_s=1.0)
    chained, loose = (costs((0.0, 0.0, 0.0), there=there, size_bytes=1.0, chained=each) for each in (True, False))
    place = {"net.0": "a:0", "net.1": "b:0", "net.2": "c:0"}
    # Eight bytes a border and direction: a to b, b to c; or a to b, b to a, a to c.
    assert predict(chained, place, Execution()).forecast.step_s == pytest.approx(2 * 2 * 8.0)
    assert predict(loose, place, Execution()).forecast.step_s == pytest.approx(3 * 2 * 8.0)


def test_the_bottleneck_in_words() -> None:
    there = costs((1.0, 5.0))
    assert predict(there, dealt(there, 1, 1), forward(4)).forecast.bottleneck == "compute of b:0"
    slow = costs((1.0, 1.0), there=inventory(bytes_per_s=0.01), size_bytes=1.0)
    assert "link" in predict(slow, dealt(slow, 1, 1), forward(4)).forecast.bottleneck


def test_what_does_not_fit_says_so() -> None:
    there = costs((1.0, 1.0), saved_bytes=GIB)
    found = predict(there, dealt(there, 1, 1), Execution())
    assert not found.fits
    assert found.forecast.devices[0].memory_bytes > GIB


def test_a_unit_without_a_device_and_a_device_without_seconds() -> None:
    there = costs((1.0, 1.0))
    with pytest.raises(
        PlacementError, match=r"'net\.1' has no device. Give every unit one of the devices a:0, b:0, c:0"
    ):
        predict(there, {"net.0": "a:0"}, Execution())
    unknown = replace(there.profile.units[1], forward_s={"a:0": Curve(((1, 1.0),))})
    lacking = Costs(
        graph=there.graph,
        inventory=there.inventory,
        profile=replace(there.profile, units=(there.profile.units[0], unknown)),
    )
    with pytest.raises(ProfileError, match=r"no seconds of the forward of 'net\.1' on 'b:0'"):
        predict(lacking, dealt(lacking, 1, 1), Execution())


def test_rows_are_split_as_the_runtime_splits_them() -> None:
    assert split_rows(10, 4) == [3, 3, 2, 2]
    assert split_rows(2, 4) == [1, 1]


SECONDS = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5).map(tuple)
SPEEDS = st.tuples(*[st.floats(0.1, 10.0)] * 3)
EXECUTIONS = st.one_of(
    st.just(Execution()),
    st.builds(forward, st.integers(2, 8), st.booleans()),
    st.builds(
        Execution, micro_batches=st.integers(1, 8), schedule=st.sampled_from(["1f1b", "gpipe", "interleaved_1f1b"])
    ),
)


@settings(deadline=None, max_examples=60)
@given(st.data(), SECONDS, SPEEDS, EXECUTIONS, st.integers(1, 20))
def test_a_step_is_never_shorter_than_what_a_device_does_in_it(
    data: st.DataObject, seconds: tuple[float, ...], speeds: tuple[float, ...], execution: Execution, rows: int
) -> None:
    there = costs(seconds, there=inventory(speeds), rows=rows, size_bytes=100.0)
    place = {name: data.draw(st.sampled_from(NAMES)) for name in there.graph.names}
    found = predict(there, place, execution)
    assert found.forecast.step_s >= max(device.busy_s for device in found.forecast.devices) * (1 - 1e-9)
    assert found.timeline.end_s == pytest.approx(found.forecast.step_s)


@settings(deadline=None, max_examples=60)
@given(st.data(), SECONDS, SPEEDS, st.integers(1, 20))
def test_faster_links_and_devices_never_make_a_whole_step_longer(
    data: st.DataObject, seconds: tuple[float, ...], speeds: tuple[float, ...], rows: int
) -> None:
    def step_s(speeds: tuple[float, ...], bytes_per_s: float) -> float:
        there = costs(seconds, there=inventory(speeds, bytes_per_s), rows=rows, size_bytes=100.0)
        return predict(there, place, Execution()).forecast.step_s

    names = [f"net.{index}" for index in range(len(seconds))]
    place = {name: data.draw(st.sampled_from(NAMES)) for name in names}
    slow_s = step_s(speeds, 100.0)
    assert step_s(speeds, 200.0) <= slow_s
    assert step_s((speeds[0] * 2, *speeds[1:]), 100.0) <= slow_s


@settings(deadline=None, max_examples=60)
@given(st.data(), SECONDS, st.integers(2, 20))
def test_more_micro_batches_never_keep_more_activations(
    data: st.DataObject, seconds: tuple[float, ...], rows: int
) -> None:
    there = costs(seconds, rows=rows * 4, saved_bytes=1e6)
    place = {name: data.draw(st.sampled_from(NAMES)) for name in there.graph.names}
    few, many = (
        predict(there, place, Execution(micro_batches=count, schedule="1f1b")).forecast for count in (rows, rows * 4)
    )
    for one, other in zip(few.devices, many.devices, strict=True):
        assert other.memory_bytes <= one.memory_bytes + 1e6
