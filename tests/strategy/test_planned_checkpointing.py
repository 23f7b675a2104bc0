"""Activation checkpointing that the plan chose: where nothing else fits, and the user left it open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero import HeteroStrategy
from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement import get_policy
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.strategy.activation_checkpointing import ActivationCheckpointing
from lightning_hetero.strategy.planning import FromFilePolicy, Planning, Terms

ROWS, WIDTH = 512, 16


class Wide(nn.Module):
    """Makes much more than it takes. Input (rows, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.down(torch.tanh(self.up(x)).sigmoid())
        return inner


def planning_of(limit: str, **terms: Any) -> tuple[Planning, Any]:
    model = nn.Sequential(*(Wide() for _ in range(6)))
    inventory = resolve_devices(f"cpu@speed=1,mem={limit}")
    planning = Planning.of(model, inventory, get_policy("auto"), training=True, terms=Terms(**terms))
    with Recording(model, planning.graph) as recording:
        recording.ends_in(model(torch.ones(ROWS, WIDTH)).square().sum())
    return planning, measure_model(recording, inventory)


def test_a_plan_takes_to_it_and_keeps_it_in_its_file() -> None:
    planning, profile = planning_of("3MiB", may_checkpoint=True)
    (plan, *_) = planning.with_profile(2.0, profile)
    assert set(plan.checkpointed) == set(planning.graph.names)
    assert any("activation checkpointing" in note for note in plan.notes)
    again = Planning(
        graph=planning.graph,
        inventory=planning.inventory,
        policy=FromFilePolicy(plan),
        training=True,
        terms=Terms(),
        is_fixed=True,
    )
    (repeated, *_) = again.with_profile(2.0, profile)
    assert (repeated.checkpointed, repeated.forecast) == (plan.checkpointed, plan.forecast)


def test_what_the_user_says_comes_first() -> None:
    planning, profile = planning_of("3MiB", may_checkpoint=True)
    (plan, *_) = planning.with_profile(2.0, profile)
    assert ActivationCheckpointing(None).applied(plan, rematerialize=False) == plan
    assert ActivationCheckpointing(False).applied(plan, rematerialize=False).checkpointed == ()


def test_it_is_not_taken_to_where_it_is_not_open() -> None:
    planning, profile = planning_of("3MiB")
    with pytest.raises(InfeasiblePlanError, match="found no plan that fits"):
        planning.with_profile(2.0, profile)


@pytest.mark.parametrize(
    ("options", "is_open"),
    [
        ({}, True),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": ["cpu"]}, False),
        ({"compile": "stage"}, False),
        ({"rematerialize": True, "micro_batches": 2}, False),
    ],
)
def test_plans_may_take_to_it_unless_the_user_says_otherwise(options: dict[str, Any], is_open: bool) -> None:
    assert HeteroStrategy(**options)._terms.may_checkpoint is is_open
