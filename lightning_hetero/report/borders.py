"""What passes from stage to stage in a step, whatever way it takes."""

from __future__ import annotations

from typing import NamedTuple

from lightning_hetero.plan import Plan
from lightning_hetero.simulate import Costs

OWN_CODE = -1
"""In the place of a stage: the batch, and the model's own code with the loss."""


class Border(NamedTuple):
    """Tensors that one stage makes and another takes.

    Attributes:
        source: Index of the stage that makes them, or `OWN_CODE`.
        target: Index of the stage that takes them, or `OWN_CODE`.
        size_bytes: How much, in the forward of a whole batch. The backward sends as much gradient back at most.
    """

    source: int
    target: int
    size_bytes: int


def borders_of(costs: Costs, plan: Plan) -> tuple[Border, ...]:
    """Add up the flows of a profile between the stages of a plan; units that the plan does not know are own code."""
    stage_of = {unit: index for index, stage in enumerate(plan.stages) for unit in stage.units}
    stages = [stage_of.get(costs.graph[unit.name].name, OWN_CODE) for unit in costs.units]
    found: dict[tuple[int, int], float] = {}
    for flow in costs.flows:
        source, target = (stages[unit] if unit >= 0 else OWN_CODE for unit in (flow.source, flow.target))
        if source != target:
            found[source, target] = found.get((source, target), 0.0) + flow.size_bytes(costs.profile.rows)
    return tuple(Border(*pair, round(size)) for pair, size in sorted(found.items()))
