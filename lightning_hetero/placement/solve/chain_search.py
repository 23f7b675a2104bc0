"""The lowest simulated step time of a chain: plans in order of a bound that no simulation can undercut."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count

import numpy as np

from lightning_hetero.placement.solve.chain_bottleneck import ChainAnswer
from lightning_hetero.placement.solve.chain_classes import DeviceClasses, Floats
from lightning_hetero.placement.solve.chain_local import Effort, improve_step
from lightning_hetero.placement.solve.chain_problem import ChainPlan
from lightning_hetero.placement.solve.chain_table import Path, SuffixTable, as_plan
from lightning_hetero.placement.solve.proof import ROUNDING, Proof, never


@dataclass(order=True, slots=True)
class _Begun:
    """The first stages of a plan, and what is known about all plans that begin so.

    Attributes:
        bound: No such plan has a faster step.
        turn: Breaks ties in the order of creation.
        path: The stages so far.
        bag: Devices for the rest, as a code of the table.
        group: Link group of the next stage; -1 if there is none.
        first: First layer of the next stage.
        way_s: Time of one micro-batch through the stages so far, there and back.
        worst_s: The bound that these stages alone give.
    """

    bound: float
    turn: int
    path: Path = field(compare=False)
    bag: int = field(compare=False)
    group: int = field(compare=False)
    first: int = field(compare=False)
    way_s: float = field(compare=False, default=0.0)
    worst_s: float = field(compare=False, default=0.0)

    @property
    def complete(self) -> bool:
        """Whether all layers are placed."""
        return self.group < 0


def least_step(
    classes: DeviceClasses,
    candidates: list[ChainPlan],
    effort: Effort,
    out_of_time: Callable[[], bool] = never,
) -> ChainAnswer:
    """Improve the candidates, then go through all plans in order of their bound until the bound says stop.

    Args:
        classes: The problem.
        candidates: At least one plan that fits.
        effort: How much may be simulated.
        out_of_time: Asked between simulations.
    """
    problem = classes.problem
    plan, best = improve_step(problem, candidates, effort.part(0.5), out_of_time)
    table = SuffixTable(classes, "fill", best)
    search = _BestFirst(table)
    while (begun := search.next(below=best)) is not None:
        if effort.spent or out_of_time():
            return _answer(plan, best, begun.bound)
        effort.nodes -= 1
        if begun.complete:
            other = as_plan(classes, begun.path)
            effort.pay(problem, other)
            if problem.step_time_s(other) < best:
                plan, best = improve_step(problem, [other], effort, out_of_time)
        else:
            search.grow(begun, below=best)
    return _answer(plan, best, best)


def _answer(plan: ChainPlan, value: float, bound: float) -> ChainAnswer:
    proof = Proof(value=value, lower_bound=min(value, bound), method="plans in order of their fill bound, simulated")
    return ChainAnswer(plan=plan, proof=proof)


class _BestFirst:
    """Begun and complete plans by rising bound."""

    def __init__(self, table: SuffixTable) -> None:
        self._grower = _Grower(table)
        self._turns = count()
        whole = table.value[:, :, 0, 0]
        self._heap = [
            _Begun(float(whole[bag, group]), next(self._turns), [], int(bag), int(group), 0)
            for bag, group in zip(*np.nonzero(np.isfinite(whole)), strict=True)
        ]
        heapq.heapify(self._heap)

    def next(self, below: float) -> _Begun | None:
        """The plan with the lowest bound; None if no bound is below the value."""
        if not self._heap or self._heap[0].bound >= below * (1 - ROUNDING):
            return None
        return heapq.heappop(self._heap)

    def grow(self, begun: _Begun, below: float) -> None:
        """Add one more stage to a begun plan, in all ways."""
        for bound, rest in self._grower(begun, below * (1 - ROUNDING)):
            heapq.heappush(self._heap, _Begun(bound, next(self._turns), *rest))


class _Grower:
    """Adds one more stage to a begun plan, in all ways."""

    def __init__(self, table: SuffixTable) -> None:
        self.table, self.classes = table, table.classes
        self.fits = lru_cache(maxsize=None)(self._fits)
        self.grids = [self._grid(c) for c in range(len(table.windows))]

    def _grid(self, c: int) -> tuple[Floats, Floats, Floats]:
        """Forward, backward and update seconds of class c, each [first layer, length - 1]."""
        shape = (self.classes.layers + 1, len(self.table.windows[c]))
        forward, backward, update = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        for windows in self.table.windows[c]:
            spot = slice(len(windows.forward_s)), windows.length - 1
            forward[spot], backward[spot], update[spot] = windows.forward_s, windows.backward_s, windows.update_s
        return forward, backward, update

    def _fits(self, c: int, behind: int) -> Floats:
        """0 where a run fits and infinity where it does not, [first layer, length - 1]."""
        grid = np.full(self.grids[c][0].shape, np.inf)
        for windows in self.table.windows[c]:
            fits = self.classes.fits(c, windows, behind)
            grid[: len(fits), windows.length - 1] = np.where(fits, 0.0, np.inf)
        return grid

    def __call__(self, begun: _Begun, limit: float) -> Iterator[tuple[float, tuple[Path, int, int, int, float, float]]]:
        """The fields of all longer plans with a bound below the limit."""
        table, classes, first = self.table, self.classes, begun.first
        stages = int(table.digits[begun.bag].sum())
        for c, group in enumerate(classes.group_of):
            if group != begun.group or not table.digits[begun.bag, c]:
                continue
            bag = int(begun.bag - table.strides[c])
            count = min(len(self.table.windows[c]), classes.layers - first)
            stops = first + 1 + np.arange(count)
            forward, backward, update = (grid[first, :count] for grid in self.grids[c])
            compute = forward + backward + self.fits(c, stages - 1)[first, :count]
            work = begun.way_s + compute * table.micro_batches + update
            if stages == 1:
                worst = np.maximum(begun.worst_s, work)
                for spot in np.flatnonzero((stops == classes.layers) & (worst < limit)):
                    value = float(worst[spot])
                    yield value, ([*begun.path, (c, first, classes.layers)], bag, -1, classes.layers, 0.0, value)
                continue
            for other in range(classes.groups):
                send = classes.send_s[group, other, stops] + classes.send_s[other, group, stops]
                way = begun.way_s + compute + send
                with np.errstate(invalid="ignore"):
                    waiting = table.waiting_s(forward, backward, stages, send + table.way[bag, other, stops])
                worst = np.maximum(begun.worst_s, work + waiting)
                bound = np.maximum(worst, way + table.value[bag, other, 0, stops])
                for spot in np.flatnonzero(bound < limit):
                    path = [*begun.path, (c, first, int(stops[spot]))]
                    rest = (path, bag, other, int(stops[spot]), float(way[spot]), float(worst[spot]))
                    yield float(bound[spot]), rest
