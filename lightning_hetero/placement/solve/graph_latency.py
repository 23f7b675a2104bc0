"""Places graphs on unequal devices such that one batch is through as early as possible; anytime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import cycle

from lightning_hetero.placement.solve.bounds import critical_path
from lightning_hetero.placement.solve.graph_anneal import Placement
from lightning_hetero.placement.solve.graph_calls import Calls, latency_s
from lightning_hetero.placement.solve.graph_groups import anneal_groups
from lightning_hetero.placement.solve.graph_problem import GraphPlan, GraphProblem
from lightning_hetero.placement.solve.graph_search import GraphAnswer, GraphSearch
from lightning_hetero.placement.solve.graph_series import Series
from lightning_hetero.placement.solve.proof import never

# Of the first round; every further one has twice as many. Small graphs need less.
POSITIONS, MOVES, MOVES_PER_ATOM = 1_000, 50_000, 1_000
# Heat and largest group of one round of annealing after another: from single atoms to whole branches.
ANNEALING = ((0.01, 1), (0.03, 4), (0.01, 12), (0.003, 4))


def solve_latency(
    problem: GraphProblem, *, rounds: int = 4, seed: int = 0, out_of_time: Callable[[], bool] = never
) -> GraphAnswer:
    """A placement with a low latency, where every accelerator is called once (see `latency_s`).

    Args:
        problem: Nodes, edges, devices and constraints.
        rounds: How often to search, twice as long each time.
        seed: Of all random choices; the same seed gives the same plan, unless time runs out.
        out_of_time: Asked now and then; once it says True, the best plan so far is returned.

    Raises:
        InfeasiblePlanError: No placement was found that fits.

    Example:
        >>> from lightning_hetero.placement.solve import GraphDevice, GraphProblem
        >>> gpus = tuple(GraphDevice(name=f"gpu:{i}", kind="gpu") for i in range(2))
        >>> branches = GraphProblem(seconds={"gpu": [4.0, 4.0]}, transfer_s={"gpu": [0.5] * 2}, size_bytes=[1] * 2,
        ...                         edges=[], devices=gpus)
        >>> solve_latency(branches).proof.value
        4.0
    """
    search = _LatencySearch(problem, seed, out_of_time)
    for number, (heat, largest) in zip(range(rounds), cycle(ANNEALING), strict=False):
        if not search.series.too_large:
            search.cut_orders(POSITIONS << number)
        search.move_groups(MOVES << number, heat, largest)
        if out_of_time() or search.done:
            break
    return search.answer("no placement with one call for each device")


class _LatencySearch(GraphSearch):
    @cached_property
    def series(self) -> Series:
        return Series(self.parts)

    def find_bound(self) -> float:
        return critical_path(self.problem.fastest_s, self.problem.users)

    def price(self, plan: GraphPlan) -> float:
        return latency_s(self.problem, plan)

    def cut(self, order: Sequence[int], row: Sequence[int], limit: float) -> GraphPlan | None:
        homes = self.series.solve(order)
        return None if homes is None else self.parts.plan(homes)

    def move_groups(self, moves: int, heat: float, largest: int) -> None:
        """Anneal the best plan."""
        homes, moves = self.begin_to_anneal(), min(moves, MOVES_PER_ATOM * self.atoms.count)
        if homes is None:
            return
        calls = Calls(Placement(self.atoms, homes))
        homes = anneal_groups(calls, self.random, moves=moves, heat=heat, largest=largest, out_of_time=self.out_of_time)
        self.keep(self.atoms.plan(homes))
