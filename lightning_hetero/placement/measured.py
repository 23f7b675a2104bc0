"""The policy `measured`: the best predictions are tried with real steps, and the fastest stays."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.auto import AutoPolicy
from lightning_hetero.placement.compare import compare, is_hopeful, truly_different
from lightning_hetero.placement.explain_choice import explain_choice
from lightning_hetero.placement.found import as_placement
from lightning_hetero.placement.judge import Judge
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import infeasible

FINALISTS = 3


@register_policy("measured")
@dataclass(frozen=True)
class MeasuredPolicy:
    """The best prediction of all policies, and others that are worth a few real steps.

    Predictions err by several percent, so among the best ones a clock has to choose. The strategy runs each finalist
    for a few steps of the training that goes on anyway, next to the plan that the run began with. The best single
    device is always among them, unless it is predicted to take half as long again. Without a profile it does what
    `auto` does.

    Args:
        finalists: How many placements are tried, at least 1. They differ in their devices, in how the batch is cut, or
            in where a quarter of the model stands.
    """

    finalists: int = FINALISTS
    name: str = "measured"

    def place(self, problem: Problem) -> Placement:
        """Choose the finalists.

        Raises:
            PlacementError: `finalists` is less than 1.
            InfeasiblePlanError: By the profile, nothing was found that fits.
        """
        if self.finalists < 1:
            raise PlacementError(f"policy 'measured' needs at least 1 finalist, got {self.finalists}")
        if problem.profile is None:
            return AutoPolicy().place(problem)
        judge = Judge(problem)
        if not judge.pieces:
            return Placement(device_of={}, notes=("The model has no units.",))
        found = compare(judge)
        best, winner, home = found.best, found.winner, found.home
        if home is not None and home.key <= best.key:
            best, winner = home, "single"
        if not best.fits:
            raise infeasible(problem, best.forecast, best.execution, self.name)
        others = truly_different(judge, best, self.finalists)[1:]
        if home is not None and home not in (best, *others) and is_hopeful(home, best) and self.finalists > 1:
            others = [*others[: self.finalists - 2], home]
        notes, alternatives = explain_choice(judge, best, winner, found.singles, found.asked, 0.0)
        return replace(
            as_placement(judge, best),
            notes=(*notes, *judge.stopped_note()),
            proof=found.asked[winner].proof if winner in found.asked else "",
            alternatives=alternatives,
            finalists=tuple(as_placement(judge, priced) for priced in others),
        )
