"""Bytes between the stages of a plan."""

from __future__ import annotations

from torch import nn

from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.profile import Flow, Line, ModelProfile, UnitCost
from lightning_hetero.report import Border, borders_of
from lightning_hetero.simulate import Costs
from lightning_hetero.testing.inventories import inventory_of


def test_flows_are_added_up_between_stages_for_the_whole_batch() -> None:
    graph = find_units(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    inventory = inventory_of("a", "b")
    flows = (
        Flow(source="", target="0", size_bytes=Line(0, 3)),
        Flow(source="0", target="1", size_bytes=Line(0, 1000)),  # stays within its stage
        Flow(source="1", target="2", size_bytes=Line(7, 10)),
        Flow(source="0", target="3", size_bytes=Line(0, 100)),
        Flow(source="3", target="", size_bytes=Line(0, 1)),
    )
    units = tuple(UnitCost(name=name) for name in graph.names)
    costs = Costs(graph, inventory, ModelProfile(model=graph.fingerprint, rows=5, units=units, flows=flows))
    device_of = dict(zip(graph.names, "aabb", strict=True))
    plan = make_plan(ManualPolicy(device_of), Problem(graph=graph, inventory=inventory))

    assert borders_of(costs, plan) == (Border(-1, 0, 15), Border(0, 1, 7 + 50 + 500), Border(1, -1, 5))
