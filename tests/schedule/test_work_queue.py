"""The queue of a worker: it keeps the order and the bound, and never gets stuck, whenever actions arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import Action, GPipe, OneFOneB, Op, Pipeline, Schedule, WorkQueue, bounds, get_schedule


@dataclass(frozen=True)
class AnyOrder:
    """A rule that prefers actions at random: `WorkQueue` has to keep its promises for any rule."""

    salt: int
    name: str = "any_order"
    all_forwards_first: bool = False
    splits_backward: bool = False

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        return Random(f"{self.salt} {action}").randrange(9)

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        return Random(f"{self.salt} {stage}").randrange(1, 4)


OPS: tuple[tuple[Op, ...], ...] = (("F", "B"), ("F", "I", "W"), ("F",), ("B",), ("I", "W"))
PIPELINES = st.builds(
    Pipeline,
    device_of=st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    micro_batches=st.integers(1, 6),
    ops=st.sampled_from(OPS),
)
NAMED = st.sampled_from(["1f1b", "gpipe", "interleaved_1f1b", "sequential", "zero_bubble"]).map(get_schedule)
SCHEDULES = NAMED | st.builds(OneFOneB, spare=st.integers(0, 3)) | st.builds(AnyOrder, st.integers(0, 99))


@dataclass
class Workers:
    """One worker for each device; which of them is next, and how long anything takes, is up to chance."""

    schedule: Schedule
    pipeline: Pipeline
    random: Random
    running: dict[int, Action] = field(default_factory=dict)
    on_the_way: list[Action] = field(default_factory=list)
    done: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queues = {device: WorkQueue(self.schedule, self.pipeline) for device in self.pipeline.devices}
        self.on_the_way = [*self.pipeline.starts()]

    def run(self) -> Iterator[Action]:
        """Every action as it begins, until nobody can go on."""
        while True:
            moves = [*self.pipeline.devices, *self.on_the_way]
            self.random.shuffle(moves)
            for move in moves:
                if isinstance(move, Action):
                    self.on_the_way.remove(move)
                    self.queues[self.pipeline.device_of[move.stage]].add(move)
                    break
                if move in self.running:
                    action = self.running.pop(move)
                    self.done.append(action)
                    self.on_the_way += self.follow(action)
                    break
                taken = self.queues[move].take()
                if taken is not None:
                    self.running[move] = taken
                    yield taken
                    break
            else:
                return

    def follow(self, action: Action) -> list[Action]:
        return [*self.pipeline.unlocks(action)]


@settings(deadline=None, max_examples=300)
@given(schedule=SCHEDULES, pipeline=PIPELINES, random=st.randoms(use_true_random=False))
def test_whatever_comes_late_all_gets_done_in_order_and_within_the_bound(
    schedule: Schedule, pipeline: Pipeline, random: Random
) -> None:
    workers = Workers(schedule, pipeline, random)
    held: Counter[int] = Counter()
    turn: Counter[tuple[int, Op]] = Counter()
    for action in workers.run():
        assert action.micro_batch == turn[action.stage, action.op]
        turn[action.stage, action.op] += 1
        held[action.stage] += (action.op == "F") - ("F" in pipeline.ops and action.op == pipeline.ops[-1])
        assert held[action.stage] <= bounds(schedule, pipeline)[action.stage]
        if schedule.all_forwards_first and "F" in pipeline.ops and action.op != "F":
            assert turn[action.stage, "F"] == pipeline.micro_batches
    assert sorted(workers.done) == sorted(pipeline.actions())


class WorkersOfUserCode(Workers):
    """Micro-batches that pass some stages by, in the forward or, where autograd needs nothing of them, on the way back.

    What they pass by is said as late as possible: when the micro-batch is through with that direction.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paths = [[*self.path(micro_batch)] for micro_batch in range(self.pipeline.micro_batches)]
        self.on_the_way = []
        for micro_batch, path in enumerate(self.paths):
            self.on_the_way.append(path[0])
            if path[0].op == "B":  # no forward at all
                self.skip(micro_batch, "F")

    def path(self, micro_batch: int) -> Iterator[Action]:
        stages = range(self.pipeline.stages)
        forward = [stage for stage in stages if self.random.random() < 0.7] or [0]
        yield from (Action(stage, "F", micro_batch) for stage in forward)
        yield from (Action(stage, "B", micro_batch) for stage in reversed(forward) if self.random.random() < 0.7)

    def follow(self, action: Action) -> list[Action]:
        path = self.paths[action.micro_batch]
        later = path[path.index(action) + 1 :]
        for op in {action.op, "B" if not later else action.op}:
            if not any(other.op == op for other in later):
                self.skip(action.micro_batch, op)
        return later[:1]

    def skip(self, micro_batch: int, op: Op) -> None:
        for stage in range(self.pipeline.stages):
            action = Action(stage, op, micro_batch)
            if action not in self.paths[micro_batch]:
                self.queues[self.pipeline.device_of[stage]].skip(action)


@settings(deadline=None, max_examples=300)
@given(
    schedule=SCHEDULES,
    device_of=st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    micro_batches=st.integers(1, 6),
    random=st.randoms(use_true_random=False),
)
def test_user_code_may_pass_stages_by_if_it_is_said(
    schedule: Schedule, device_of: tuple[int, ...], micro_batches: int, random: Random
) -> None:
    workers = WorkersOfUserCode(schedule, Pipeline(device_of=device_of, micro_batches=micro_batches), random)
    begun = [*workers.run()]

    assert sorted(begun) == sorted(workers.done) == sorted(action for path in workers.paths for action in path)
    for stage in range(len(device_of)):
        for op in ("F", "B"):
            order = [action.micro_batch for action in begun if (action.stage, action.op) == (stage, op)]
            assert order == sorted(order)


def queue(schedule: Schedule, *device_of: int, micro_batches: int, ops: tuple[Op, ...] = ("F", "B")) -> WorkQueue:
    return WorkQueue(schedule, Pipeline(device_of=device_of, micro_batches=micro_batches, ops=ops))


def add(queue: WorkQueue, actions: str) -> None:
    for text in actions.split():
        queue.add(Action.parse(text))


def taken(queue: WorkQueue) -> str:
    return " ".join(map(str, iter(queue.take, None)))


def test_an_empty_queue_has_nothing_to_do() -> None:
    assert queue(GPipe(), 0, micro_batches=1).take() is None


def test_a_step_on_the_last_of_two_stages_alternates() -> None:
    last = queue(OneFOneB(spare=0), 0, 1, micro_batches=3)
    add(last, "1F0 1F1 1F2")
    assert taken(last) == "1F0"  # more may not be in flight
    assert len(last) == 2
    add(last, "1B0")
    assert taken(last) == "1B0 1F1"


def test_a_micro_batch_waits_for_the_one_before_it() -> None:
    last = queue(OneFOneB(), 0, 1, micro_batches=3)
    add(last, "1F1")
    assert taken(last) == ""
    add(last, "1F0")
    assert taken(last) == "1F0 1F1"


def test_a_skipped_action_is_waited_for_by_nobody() -> None:
    last = queue(OneFOneB(), 0, 1, micro_batches=4)
    add(last, "1F3")
    for text in ("1F1", "1F2", "1F0"):
        assert taken(last) == ""
        last.skip(Action.parse(text))
    assert taken(last) == "1F3"


def test_a_skipped_backward_makes_room_for_the_next_forward() -> None:
    last = queue(OneFOneB(spare=0), 0, 1, micro_batches=2)
    add(last, "1F0 1F1")
    assert taken(last) == "1F0"
    last.skip(Action.parse("1B0"))
    assert taken(last) == "1F1"


def test_forward_and_backward_of_a_whole_batch_may_be_one_run_or_two() -> None:
    """As where the loss looks at all outputs: no backward arrives before all forwards are over."""
    once = queue(GPipe(), 0, micro_batches=2)
    add(once, "0F1 0F0")
    assert taken(once) == "0F0 0F1"
    add(once, "0B1 0B0")
    assert taken(once) == "0B0 0B1"

    there = queue(OneFOneB(), 0, 0, micro_batches=9, ops=("F",))
    add(there, " ".join(f"0F{n}" for n in range(9)))
    assert taken(there) == " ".join(f"0F{n}" for n in range(9))  # whatever the schedule may hold
    back = queue(GPipe(), 0, 0, micro_batches=2, ops=("B",))
    add(back, "1B1 1B0")
    assert taken(back) == "1B0 1B1"


def test_gpipe_keeps_early_gradients_waiting() -> None:
    last = queue(GPipe(), 0, 1, micro_batches=2)
    add(last, "1F0 1B0")
    assert taken(last) == "1F0"
    add(last, "1F1")
    assert taken(last) == "1F1 1B0"


@pytest.mark.parametrize("text", ["2F0", "0F2", "0W0"])
def test_an_action_of_another_pipeline_is_refused(text: str) -> None:
    says = (
        rf"^{text} is no action of Pipeline\(device_of=\(0, 1\), micro_batches=2, ops=\('F', 'B'\)\); "
        "make a queue for each run of a pipeline$"
    )
    for say in (WorkQueue.add, WorkQueue.skip):
        with pytest.raises(ScheduleError, match=says):
            say(queue(GPipe(), 0, 1, micro_batches=2), Action.parse(text))


@pytest.mark.parametrize("first", [WorkQueue.add, WorkQueue.skip])
@pytest.mark.parametrize("again", [WorkQueue.add, WorkQueue.skip])
@pytest.mark.parametrize("take", [False, True])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_saying_an_action_twice_is_refused(first, again, take: bool, micro_batch: int) -> None:  # type: ignore[no-untyped-def]
    device, action = queue(GPipe(), 0, micro_batches=2), Action(0, "F", micro_batch)
    first(device, action)
    if take:
        device.take()
    with pytest.raises(ScheduleError, match=rf"^{action} was added or skipped before; say it once, when its inputs"):
        again(device, action)
