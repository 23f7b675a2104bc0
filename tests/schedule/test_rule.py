"""Schedules by name, and the bound that every rule must leave room in."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import (
    Action,
    GPipe,
    Interleaved1F1B,
    OneFOneB,
    Pipeline,
    Schedule,
    Sequential,
    WorkQueue,
    ZeroBubble,
    bounds,
    get_schedule,
    register_schedule,
    rule,
    schedule_names,
)

KINDS = {
    "1f1b": OneFOneB,
    "gpipe": GPipe,
    "interleaved_1f1b": Interleaved1F1B,
    "sequential": Sequential,
    "zero_bubble": ZeroBubble,
}


@dataclass
class Backwards:
    """A rule of somebody else's: the last micro-batch first."""

    held: int = 1
    name: str = "backwards"
    all_forwards_first: bool = False
    splits_backward: bool = False

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        return -action.micro_batch

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        return self.held


def test_schedules_are_found_by_name() -> None:
    assert schedule_names() == tuple(KINDS)
    for name, kind in KINDS.items():
        schedule = get_schedule(name)
        assert type(schedule) is kind
        assert isinstance(schedule, Schedule)
        assert schedule.name == name


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    known = "1f1b, gpipe, interleaved_1f1b, sequential, zero_bubble"
    with pytest.raises(ScheduleError, match=rf"^unknown schedule 'gpip'\. Did you mean 'gpipe'\? Known are {known}\.$"):
        get_schedule("gpip")
    with pytest.raises(ScheduleError, match=rf"^unknown schedule 'x'\. Known are {known}\.$"):
        get_schedule("x")


def test_people_may_register_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_SCHEDULES", dict(rule._SCHEDULES))
    assert register_schedule("backwards")(Backwards) is Backwards
    assert isinstance(get_schedule("backwards"), Backwards)


def test_only_the_all_forwards_first_schedule_waits_for_the_whole_batch_and_only_one_splits() -> None:
    assert [name for name in KINDS if get_schedule(name).all_forwards_first] == ["gpipe"]
    assert [name for name in KINDS if get_schedule(name).splits_backward] == ["zero_bubble"]


@pytest.mark.parametrize(
    ("schedule", "held"),
    [
        (Sequential(), (1, 1, 1)),
        (GPipe(), (9, 9, 9)),
        (OneFOneB(spare=0), (3, 2, 1)),
        (OneFOneB(), (4, 3, 2)),
        (OneFOneB(spare=99), (9, 9, 9)),
        (ZeroBubble(), (4, 4, 4)),
    ],
)
def test_each_stage_may_hold_so_many_of_nine_micro_batches(schedule: Schedule, held: tuple[int, ...]) -> None:
    assert bounds(schedule, Pipeline(device_of=(0, 1, 2), micro_batches=9)) == held


@pytest.mark.parametrize("kind", [OneFOneB, Interleaved1F1B, ZeroBubble])
def test_fewer_than_no_spare_micro_batches_are_refused(kind: type) -> None:
    says = r"^spare must be 0 or more micro-batches, got -1; sequential holds fewer$"
    with pytest.raises(ScheduleError, match=says):
        kind(spare=-1)


@pytest.mark.parametrize(
    ("held", "all_forwards_first", "why"),
    [
        (0, False, "may hold 0 of 2 micro-batches, but each has to pass; in_flight has to answer 1 or more"),
        (1, True, "may hold 1 of 2 micro-batches, but all forwards come first; in_flight has to answer 2 or more"),
    ],
)
def test_a_rule_that_would_get_stuck_is_refused_before_anything_runs(
    held: int, all_forwards_first: bool, why: str
) -> None:
    schedule = Backwards(held, all_forwards_first=all_forwards_first)
    pipeline = Pipeline(device_of=(0, 1), micro_batches=2)
    says = f"schedule 'backwards' would get stuck: stage 0 {why}"
    with pytest.raises(ScheduleError, match=f"^{re.escape(says)}$"):
        bounds(schedule, pipeline)
    with pytest.raises(ScheduleError, match=f"^{re.escape(says)}$"):
        WorkQueue(schedule, pipeline)
