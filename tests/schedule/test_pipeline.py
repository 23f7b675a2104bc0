"""The pipeline: which action needs which."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import Action, Op, Pipeline

WHOLE: tuple[Op, ...] = ("F", "B")
SPLIT: tuple[Op, ...] = ("F", "I", "W")
FORWARD: tuple[Op, ...] = ("F",)
BACKWARD: tuple[Op, ...] = ("B",)
SPLIT_BACKWARD: tuple[Op, ...] = ("I", "W")
EVERY = (WHOLE, SPLIT, FORWARD, BACKWARD, SPLIT_BACKWARD)


@pytest.mark.parametrize(
    ("ops", "action", "needs"),
    [
        (WHOLE, "0F1", ""),
        (WHOLE, "2F1", "1F1"),
        (WHOLE, "2B1", "2F1"),
        (WHOLE, "0B1", "0F1 1B1"),
        (SPLIT, "2I1", "2F1"),
        (SPLIT, "0I1", "0F1 1I1"),
        (SPLIT, "0W1", "0I1"),
        (FORWARD, "1F0", "0F0"),
        (BACKWARD, "2B0", ""),
        (BACKWARD, "1B0", "2B0"),
        (SPLIT_BACKWARD, "1I0", "2I0"),
        (SPLIT_BACKWARD, "1W0", "1I0"),
    ],
)
def test_an_action_needs_its_neighbours(ops: tuple[Op, ...], action: str, needs: str) -> None:
    pipeline = Pipeline(device_of=(0, 1, 2), micro_batches=2, ops=ops)
    assert " ".join(map(str, pipeline.needs(Action.parse(action)))) == needs


@pytest.mark.parametrize("ops", EVERY)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_an_action_begins_when_the_last_of_its_needs_unlocks_it(ops: tuple[Op, ...], stages: int) -> None:
    pipeline = Pipeline(device_of=tuple(range(stages)), micro_batches=2, ops=ops)
    done: list[Action] = []
    todo = [*pipeline.starts()]
    while todo:
        action = todo.pop(0)
        assert {*pipeline.needs(action)} <= {*done}
        done.append(action)
        todo.extend(pipeline.unlocks(action))
    assert sorted(done) == sorted(pipeline.actions())


@pytest.mark.parametrize("ops", EVERY)
def test_it_contains_its_actions_and_no_others(ops: tuple[Op, ...]) -> None:
    pipeline = Pipeline(device_of=(0, 1), micro_batches=2, ops=ops)
    near = {Action(stage, op, mb) for stage in range(3) for op in ("F", "B", "I", "W") for mb in range(3)}
    assert {action for action in near if action in pipeline} == {*pipeline.actions()}
    assert "0F0" not in pipeline


def test_its_actions_are_every_op_of_every_stage_and_micro_batch_once() -> None:
    pipeline = Pipeline(device_of=(0, 0), micro_batches=2, ops=SPLIT)
    assert " ".join(map(str, pipeline.actions())) == "0F0 0I0 0W0 0F1 0I1 0W1 1F0 1I0 1W0 1F1 1I1 1W1"


def test_devices_come_in_the_order_in_which_a_micro_batch_meets_them() -> None:
    assert Pipeline(device_of=(3, 1, 3, 0), micro_batches=1).devices == (3, 1, 0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"device_of": ()}, r"^device_of must name a device, from 0, for at least one stage; got \(\)$"),
        ({"device_of": (0, -1)}, r"^device_of must name a device, from 0, for at least one stage; got \(0, -1\)$"),
        ({"micro_batches": 0}, r"^a step has at least 1 micro-batch, got 0$"),
        ({"ops": ("B", "F")}, r"^ops must be one of \('F', 'B'\), .*; got \('B', 'F'\)$"),
    ],
)
def test_what_is_no_pipeline_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        Pipeline(**{"device_of": (0,), "micro_batches": 1, **fields})
