"""Actions: their text form is torch's."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import Action

ACTIONS = st.builds(Action, st.integers(0, 999), st.sampled_from("FBIW"), st.integers(0, 999))  # type: ignore[arg-type]


@settings(deadline=None)
@given(action=ACTIONS)
def test_an_action_survives_its_text_form(action: Action) -> None:
    assert Action.parse(str(action)) == action


@settings(deadline=None)
@given(action=ACTIONS)
def test_torch_reads_and_writes_the_same_text(action: Action) -> None:
    torchs = _Action.from_str(str(action))

    assert (torchs.stage_index, torchs.computation_type.value, torchs.microbatch_index) == (
        action.stage,
        action.op,
        action.micro_batch,
    )
    assert str(torchs) == str(action)


@pytest.mark.parametrize("text", ["2F0", "10B3", "2I0", "2W0", " 2F0 "])
def test_the_text_is_stage_op_micro_batch(text: str) -> None:
    assert str(Action.parse(text)) == text.strip()


@pytest.mark.parametrize("text", ["", "2F", "F0", "2X0", "-1F0", "2f0", "2F0 1F0", "2SEND_F0", "٢F0"])
def test_other_text_is_refused_with_an_example(text: str) -> None:
    says = f"{text!r} is not an action; write stage, op (F, B, I, W) and micro-batch, such as '2F0'"
    with pytest.raises(ScheduleError, match=re.escape(says)):
        Action.parse(text)


def test_an_impossible_action_cannot_be_made() -> None:
    with pytest.raises(ScheduleError, match=r"^unknown op 'X' of an action; known are F, B, I, W$"):
        Action(0, "X", 0)  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=r"^stages and micro-batches count from 0, got stage 0 and micro-batch -1$"):
        Action(0, "F", -1)


def test_actions_are_ordered_and_frozen() -> None:
    assert sorted(map(Action.parse, ["1F0", "0F1", "0F0", "0B0"])) == [*map(Action.parse, ["0B0", "0F0", "0F1", "1F0"])]
    with pytest.raises(FrozenInstanceError):
        Action(0, "F", 0).stage = 1  # type: ignore[misc]
