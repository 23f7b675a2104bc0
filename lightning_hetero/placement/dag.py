"""The policy `dag`: a search over placements of any graph that evens out the devices' loads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement import proportional
from lightning_hetero.placement.as_graph import as_graph, homes_of
from lightning_hetero.placement.found import Found, best_of, place_by
from lightning_hetero.placement.improve import improve
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.memory_first import fill
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import in_words
from lightning_hetero.placement.solve import solve_graph

ROUNDS, TRIES = 1, 150


@register_policy("dag")
@dataclass(frozen=True)
class DagPolicy:
    """Place a graph of any shape such that the slowest device has as little to do as possible; anytime.

    Branches and skips may go anywhere, and a device may have several runs of units. The solver works with as many
    micro-batches as are best for the shares of `proportional`, with one run for each device and with any number of
    them; all ways to run are then compared in the simulator.

    Args:
        rounds: How often to search, each time twice as long.
        tries: How many changed placements may be simulated in the end.
    """

    rounds: int = ROUNDS
    tries: int = TRIES
    name: str = "dag"

    def place(self, problem: Problem) -> Placement:
        """Search."""
        search = partial(find, rounds=self.rounds, tries=self.tries)
        return place_by(search, problem, self.name, "Units were dealt out so that the slowest device has least to do.")


def find(judge: Judge, *, rounds: int = ROUNDS, tries: int = TRIES) -> Found:
    """The best placement that was found, and the proof of the solver."""
    proofs: dict[Priced, str] = {}
    execution = proportional.find(judge).best.execution
    for contiguous in (True, False):
        if judge.time_is_up():
            break
        graph = as_graph(judge, execution, own_code=not contiguous)
        try:
            answer = solve_graph(graph, contiguous=contiguous, rounds=rounds, out_of_time=judge.time_is_up)
        except InfeasiblePlanError:
            continue
        priced = judge.best_execution(homes_of(judge, answer.plan))
        proofs.setdefault(priced, f"load of the slowest device ({in_words(execution)}): {answer.proof}")
    if not proofs:
        proofs = {judge.best_execution(fill(judge.problem, judge.pieces)[0]): ""}
    start = best_of((*proofs, *judge.singles().values()))
    return Found(best=improve(judge, start, tries=tries), proof=proofs.get(start, ""))
