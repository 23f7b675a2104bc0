"""The policy `heft`: list scheduling, for the latency of one batch through a branchy model."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.as_graph import as_graph, homes_of
from lightning_hetero.placement.executions import sparse
from lightning_hetero.placement.found import Found, best_of, place_by
from lightning_hetero.placement.improve import repair
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.memory_first import fill
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.solve import heft, solve_latency


@register_policy("heft")
@dataclass(frozen=True)
class HeftPolicy:
    """Place units such that one batch is through as early as possible, branches side by side.

    Two solvers are asked: HEFT (Topcuoglu, Hariri and Wu, 2002), and a search for the lowest latency where every
    device is called once (Tarnawski et al., 2020). The simulator chooses, and says how the batch is to run.
    """

    name: str = "heft"

    def place(self, problem: Problem) -> Placement:
        """Schedule."""
        return place_by(find, problem, self.name, "Units were scheduled such that one batch is through early.")


def find(judge: Judge) -> Found:
    """The better answer of the two solvers."""
    problem = judge.problem
    graph = as_graph(judge, sparse(judge.executions)[0], forward_only=problem.objective == "latency")
    proofs: dict[Priced, str] = {}
    try:
        scheduled = heft(graph)
        proofs[judge.best_execution(homes_of(judge, scheduled.plan))] = f"latency: {scheduled.proof}"
    except InfeasiblePlanError:
        pass  # it never looks back; the search below may still find room
    try:
        searched = solve_latency(graph, rounds=1, out_of_time=judge.time_is_up)
        proofs[judge.best_execution(homes_of(judge, searched.plan))] = f"latency: {searched.proof}"
    except InfeasiblePlanError:
        pass
    if problem.is_stream:  # what is proved of one batch says nothing of how often one leaves
        proofs = dict.fromkeys(proofs, "")
    if not proofs:
        proofs = {judge.best_execution(fill(problem, judge.pieces)[0]): ""}
    start = best_of((*proofs, *judge.singles().values()))
    return Found(best=repair(judge, start), proof=proofs.get(start, ""))
