"""Places graphs of any shape on unequal devices such that the slowest has as little to do as possible; anytime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import numpy as np

from lightning_hetero.placement.solve.bounds import least_slowest
from lightning_hetero.placement.solve.graph_anneal import Placement, anneal
from lightning_hetero.placement.solve.graph_intervals import Intervals
from lightning_hetero.placement.solve.graph_problem import GraphPlan, GraphProblem
from lightning_hetero.placement.solve.graph_search import GraphAnswer, GraphSearch
from lightning_hetero.placement.solve.proof import ROUNDING, never

# Of the first round; every further one has twice as many. Small graphs need less.
POSITIONS, MOVES, MOVES_PER_ATOM = 10_000, 300_000, 5_000
# Heat and power of one round of annealing after another: bold ones find other valleys, careful ones their ground.
ANNEALING = ((0.1, 32.0), (1.0, 8.0), (0.02, 32.0), (0.3, 8.0), (0.005, 32.0))


def solve_graph(
    problem: GraphProblem,
    *,
    contiguous: bool = False,
    rounds: int = 3,
    seed: int = 0,
    out_of_time: Callable[[], bool] = never,
) -> GraphAnswer:
    """A placement with a small bottleneck: the value of its proof is the load of the slowest device in seconds.

    First come plans of contiguous parts: many topological orders, each cut at the best places by a dynamic programme.
    Then single nodes move wherever it helps. Both are repeated, twice as long each time.

    Args:
        problem: Nodes, edges, devices and constraints.
        contiguous: Whether every part must be contiguous: no path of forward nodes leaves it and comes back, so that
            its device can do its work in one go.
        rounds: How often to search.
        seed: Of all random choices; the same seed gives the same plan, unless time runs out.
        out_of_time: Asked now and then; once it says True, the best plan so far is returned.

    Raises:
        InfeasiblePlanError: No placement was found that fits.

    Example:
        >>> from lightning_hetero.placement.solve import GraphDevice, GraphProblem
        >>> gpus = tuple(GraphDevice(name=f"gpu:{i}", kind="gpu") for i in range(2))
        >>> diamond = GraphProblem(seconds={"gpu": [1.0, 4.0, 4.0, 1.0]}, transfer_s={"gpu": [0.5] * 4},
        ...                        size_bytes=[1] * 4, edges=[(0, 1), (0, 2), (1, 3), (2, 3)], devices=gpus)
        >>> solve_graph(diamond).proof.value
        6.0
    """
    search = _BottleneckSearch(problem, seed, out_of_time)
    for number, (heat, power) in zip(range(rounds), cycle(ANNEALING), strict=False):
        search.cut_orders(POSITIONS << number)
        if not contiguous:
            search.move_nodes(MOVES << number, heat, power)
        if out_of_time() or search.done:
            break
    return search.answer("no contiguous placement" if contiguous else "no placement")


class _BottleneckSearch(GraphSearch):
    def find_bound(self) -> float:
        return least_slowest(np.array([self.atoms.seconds_on(device) for device in self.problem.devices]))

    def price(self, plan: GraphPlan) -> float:
        return self.problem.max_load_s(plan)

    def cut(self, order: Sequence[int], row: Sequence[int], limit: float) -> GraphPlan | None:
        intervals = Intervals(self.parts, row)
        for cap in [limit] if self.tried else self._rising_caps():
            found = intervals.solve(order, cap)
            if found is not None:
                return self.parts.plan(found[1])
        return None

    def _rising_caps(self) -> Iterator[float]:
        """Caps for the first order: a low one makes the programme quick, and what it finds is the best."""
        cap = 1.1 * max(self.bound, sum(map(sum, self.atoms.seconds.values())) / 1000 / len(self.problem.devices))
        while cap < min(self.value, 1000 * len(self.problem.devices) * self.bound):
            yield cap
            cap *= 1.3
        yield self.value * (1 + ROUNDING)

    def move_nodes(self, moves: int, heat: float, power: float) -> None:
        """Anneal the best plan."""
        homes, moves = self.begin_to_anneal(), min(moves, MOVES_PER_ATOM * self.atoms.count)
        if homes is None:
            return
        placement = Placement(self.atoms, homes)
        homes = anneal(placement, self.random, moves=moves, heat=heat, power=power, out_of_time=self.out_of_time)
        self.keep(self.atoms.plan(homes))
