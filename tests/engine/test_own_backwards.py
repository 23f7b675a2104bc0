"""Functions of autograd whose backward calls modules, as adjoint methods and reversible layers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.testing.own_backwards import Equilibrium, Integrates, Reverses, RunsAgain
from lightning_hetero.testing.rows import squares

MakePair = Callable[..., Any]
ROUNDING = 1e-12
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


def model(kind: type[Integrates]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 8)).double()


@pytest.mark.parametrize("options", [{}, {"rematerialize": True}], ids=["", "rematerialize"])
@pytest.mark.parametrize("kind", [Integrates, Reverses, Equilibrium])
def test_a_backward_that_calls_parts_of_the_model_runs_whole(
    pair: MakePair, kind: type[Integrates], options: dict[str, Any]
) -> None:
    # On several kinds of devices, the gradient that a function gives may be on another one than what it was given.
    both = pair(model(kind), **({"on": EMULATED} if kind is not Reverses else {}), **options)
    for _ in range(3):
        both.step(squares)
        assert both.difference < ROUNDING
        assert float(both.model[1].field.net[0].weight.grad.abs().max()) > 0
    reason = "the backward of its code calls 1.field.net"
    if kind is Equilibrium:
        reason = "a function of autograd calls 1.field.net.0…1.field.net.1, and computes gradients itself"
    assert reason in both.engine.reasons[0]


def test_a_part_that_adds_to_gradients_itself_runs_whole(pair: MakePair) -> None:
    """Also where it is one unit, and several devices share its rows."""
    for where in ("round_robin", {"": {"emulated:0": 2, "emulated:1": 1}}):
        both = pair(model(Reverses), where, on=EMULATED, no_split=("1",))
        for _ in range(3):
            both.step(squares)
            assert both.difference < ROUNDING


def test_parts_that_checkpointing_runs_again_are_cut(pair: MakePair) -> None:
    both = pair(model(RunsAgain))
    for _ in range(3):
        both.step(squares)
        assert both.difference < ROUNDING
    assert both.calls


@pytest.mark.parametrize("kind", [Integrates, Equilibrium])
def test_a_backward_that_calls_a_part_on_one_device_is_cut(pair: MakePair, kind: type[Integrates]) -> None:
    """The part and what calls it are one unit."""
    both = pair(model(kind), no_split=("1",))
    for _ in range(3):
        both.step(squares)
        assert both.difference < ROUNDING
    assert both.calls
