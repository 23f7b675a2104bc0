"""When a run is planned anew, and what that costs. Seconds are made up; the planner and the plans are real."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_hetero.devices import DeviceSpec, Inventory, Link
from lightning_hetero.errors import UsageError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import get_policy
from lightning_hetero.plan import Plan
from lightning_hetero.profile import Curve, Flow, Line, ModelProfile, UnitCost
from lightning_hetero.runtime.engine.record import Record, Recording
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.recalibrate import scaled
from lightning_hetero.strategy import online
from lightning_hetero.strategy.busy import busy_table
from lightning_hetero.strategy.online import DRIFT, MOST, WINDOW, WINDOWS, Drift, Online, migration_s
from lightning_hetero.strategy.planning import Planning, Terms
from lightning_hetero.strategy.watch import StepClock
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference

MODEL = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
LINK_S = 1.0  # to move one unit with its gradients and the state of its optimizer: 8 * 9 parameters, 16 bytes each


def planning(policy: str = "single") -> Planning:
    """Four layers on two devices that are joined by a slow link."""
    graph = find_units(MODEL)
    unit_bytes = graph.units[0].parameter_bytes * 4
    inventory = Inventory(
        devices=tuple(DeviceSpec(name=n, kind="dev", memory_bytes=1 << 30, torch_device="cpu") for n in "ab"),
        links=tuple(
            Link(source=x, target=y, bandwidth_bytes_per_s=unit_bytes / LINK_S, latency_s=0.0) for x, y in ("ab", "ba")
        ),
    )
    return Planning(
        graph=graph, inventory=inventory, policy=get_policy(policy), training=True, terms=Terms(), is_fixed=False
    )


def profile() -> ModelProfile:
    """Each layer takes 1 s forward and 2 s backward on `a`, half as long again on `b`. 3 * 4 s a step on `a`."""
    graph = find_units(MODEL)

    def curves(seconds: float) -> dict[str, Curve]:
        return {"a": Curve(((8, seconds),)), "b": Curve(((8, 1.5 * seconds),))}

    units = tuple(UnitCost(name=name, forward_s=curves(1.0), backward_s=curves(2.0)) for name in graph.names)
    flows = tuple(
        Flow(source=one, target=other, size_bytes=Line(), chained=True) for one, other in pairwise(graph.names)
    )
    return ModelProfile(model=graph.fingerprint, rows=8, units=units, flows=flows)


class Told(StepClock):
    """A clock that is told what a step took."""

    seconds = 0.0

    def tick(self, wait_for: Any = ()) -> float:
        return self.seconds


@contextmanager
def nothing_to_record() -> Iterator[Recording]:
    raise UsageError("connected mode")
    yield  # type: ignore[unreachable]


def watch(steps_left: float = 1e6, record: Callable[[], Any] = nothing_to_record, policy: str = "single") -> Online:
    plan, *_ = planning(policy).with_profile(2.0, profile())
    watching = Online(planning(policy), profile(), plan, steps_left=lambda: steps_left, recording=record)
    watching._clock = Told()
    return watching


def pass_steps(watching: Online, count: int, seconds: float) -> Plan | None:
    """So many borders, until one hands over a plan."""
    watching._clock.seconds = seconds  # type: ignore[attr-defined]
    for _ in range(count):
        plan = watching.border(MODEL)
        if plan is not None:
            return plan
    return None


@pytest.mark.parametrize("ratio", [1 + 2 * DRIFT, 1 / (1 + 2 * DRIFT)])
def test_a_drift_has_to_last(ratio: float) -> None:
    drift = Drift()
    assert not drift.lasts(10.0)
    assert [drift.lasts(10.0 * ratio) for _ in range(WINDOWS)] == [False] * (WINDOWS - 1) + [True]
    passing = Drift()
    passing.lasts(10.0)
    assert not any(passing.lasts(10.0 * r) for r in [ratio, ratio, 1.0, ratio, ratio, 1 / ratio, ratio, ratio])


def test_less_than_a_fifth_is_no_drift() -> None:
    drift = Drift()
    assert not any(drift.lasts(seconds) for seconds in [10.0, *[11.9] * 10, *[8.4] * 10])


def test_a_run_that_keeps_its_pace_keeps_its_plan() -> None:
    assert pass_steps(watch(), 20 * WINDOW, 12.0) is None


def test_a_slower_device_is_left_and_the_new_plan_has_to_prove_itself(caplog: pytest.LogCaptureFixture) -> None:
    watching = watch()
    assert pass_steps(watching, 2 * WINDOW, 12.0) is None
    with caplog.at_level(logging.INFO):
        plan = pass_steps(watching, (WINDOWS + 1) * WINDOW, 24.0)
    assert plan is not None
    assert {device.name for device in plan.used} == {"b"}
    assert plan.forecast is not None
    assert plan.forecast.step_s == pytest.approx(18.0)
    assert "costs set right (a takes 2.00 times as long)" in caplog.text
    assert not watching.is_settled
    stays: Plan = plan
    while not watching.is_settled:
        is_slow = stays.used[0].name == "b"  # slower still
        stays = pass_steps(watching, 1, 30.0 if is_slow else 24.0) or stays
    assert {device.name for device in stays.used} == {"a"}
    assert "Tried with real steps: a 24.0 s, b 30.0 s; a stays." in stays.notes[-1]


def test_a_move_has_to_pay_for_the_rest_of_the_run() -> None:
    """It takes 4 * LINK_S and gains 24 - 18 s a step; planning is left out of account, so one step would do."""
    slow = scaled(profile(), {"a": 2.0})
    new, *_ = planning().with_profile(2.0, slow)
    present, *_ = planning().with_profile(2.0, profile())
    costs = Costs(planning().graph, planning().inventory, slow, True, 2.0)
    present = replace(present, forecast=replace(new.forecast, step_s=24.0))  # type: ignore[type-var]
    assert migration_s(costs, present.device_of, new.device_of) == pytest.approx(4 * LINK_S)
    for left, pays in ((0.0, False), (1.0, False), (1.3, False), (1.4, True), (100.0, True)):
        assert watch(steps_left=left)._pays(new, present, costs, planning_s=0.0) is pays
    assert not watch(steps_left=100.0)._pays(new, present, costs, planning_s=1000.0)
    assert not watch()._pays(present, present, costs, planning_s=0.0)


def test_nothing_is_planned_that_cannot_pay_any_more() -> None:
    watching = watch(steps_left=3.0)
    pass_steps(watching, 2 * WINDOW, 12.0)
    assert pass_steps(watching, (WINDOWS + 1) * WINDOW, 24.0) is None
    assert watching.is_over


def test_a_run_is_planned_anew_a_few_times_at_most() -> None:
    watching, seconds, times = watch(policy="even"), 12.0, 0  # whose plan never changes
    while not watching.is_over:
        assert pass_steps(watching, 2 * WINDOW, seconds) is None
        seconds *= 2
        assert pass_steps(watching, (WINDOWS + 1) * WINDOW, seconds) is None
        times += 1
    assert times == MOST


def test_a_recorded_step_tells_which_device_is_slower() -> None:
    """Recorded is what the profile says of `a`, and three times that of `b`."""

    @contextmanager
    def record() -> Iterator[Recording]:
        names = find_units(MODEL).names
        recording = Recording("ab", {name: 0 if spot < 2 else 1 for spot, name in enumerate(names)})
        recording.records = [
            Record("a", names[0], "F", 0, 0.0, 2.0),
            Record("b", names[2], "F", 0, 2.0, 11.0),
            Record("b", names[2], "B", 0, 11.0, 29.0),
            Record("a", names[0], "B", 0, 29.0, 33.0),
        ]
        yield recording

    watching = watch(record=record, policy="even")
    pass_steps(watching, 2 * WINDOW, 15.0)
    pass_steps(watching, (WINDOWS + 1) * WINDOW, 33.0)
    assert watching._profile.units[0].forward_s["a"](8) == pytest.approx(1.0)
    assert watching._profile.units[0].forward_s["b"](8) == pytest.approx(4.5)


def test_predicted_and_measured_work_of_each_device_stand_side_by_side() -> None:
    plan, *_ = planning("even").with_profile(2.0, profile())
    recording = Recording("ab", dict.fromkeys(find_units(MODEL).names, 0))
    recording.records = [Record("a", "0", "F", 0, 0.0, 8.0), Record("b", "2", "F", 0, 8.0, 12.0)]
    table = busy_table(planning("even"), profile(), plan, recording.timeline, steps=2)
    assert [(row.device, row.predicted_s, row.measured_s) for row in table] == [("a", 6.0, 4.0), ("b", 9.0, 2.0)]
    assert [line.split() for line in str(table).splitlines()] == [
        ["device", "predicted", "busy", "measured", "busy"],
        ["a", "6.00", "s", "4.00", "s"],
        ["b", "9.00", "s", "2.00", "s"],
    ]


class Slows(pl.Callback):
    """Makes the first device of the accelerator slow, once the model was measured and the plan adopted."""

    def __init__(self, accelerator: EmulatedAccelerator, at_step: int) -> None:
        self.accelerator, self.at_step = accelerator, at_step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at_step:
            self.accelerator.configure(0, latency_s=0.02)


@pytest.mark.usefixtures("devices_measured_once")
def test_a_run_whose_device_slows_down_is_planned_anew_without_a_change_of_results(
    plain: Any,
    hetero: Any,
    accelerator: EmulatedAccelerator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Any,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(online, "WINDOW", 4)
    loader = data(rows=480)
    alone = Classifier()
    plain(max_epochs=1).fit(alone, loader)
    devices = accelerator.devices[:2]
    module = Classifier()
    trainer = hetero(
        devices=devices,
        placement="even",
        strategy={"profile": "always", "replan": "auto", "micro_batches": 2, "planning_limit_s": 1e-3},
        max_epochs=1,
        callbacks=[Slows(accelerator, 30)],
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(module, loader)
    assert "costs set right (" in caplog.text
    assert difference(alone, module) <= 1e-9


def test_what_was_not_measured_cannot_be_compared(hetero: Any) -> None:
    class Asks(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            with pytest.raises(UsageError, match="the model was not measured in this run"):
                trainer.strategy.forecast_against_measured(Recording((), {}))

    hetero(max_epochs=1, callbacks=[Asks()], strategy={"profile": "never"}).fit(Classifier(), data())
    with pytest.raises(UsageError, match="replan='always' is not known; it may be 'never' or 'auto'"):
        hetero(strategy={"replan": "always"})
    with pytest.raises(UsageError, match="planning_limit_s=0 must be a number of seconds above 0"):
        hetero(strategy={"planning_limit_s": 0})
