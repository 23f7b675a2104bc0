"""The smallest possible bottleneck of a chain, and the lowest step formula over all bottlenecks."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_hetero.placement.solve.bounds import least_slowest
from lightning_hetero.placement.solve.chain_classes import DeviceClasses, Floats
from lightning_hetero.placement.solve.chain_problem import ChainPlan, ChainProblem
from lightning_hetero.placement.solve.chain_table import SuffixTable, as_plan
from lightning_hetero.placement.solve.proof import ROUNDING, Proof, never


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainAnswer:
    """A plan for a chain and how good it is."""

    plan: ChainPlan
    proof: Proof


def compute_table(problem: ChainProblem) -> Floats:
    """Seconds of one micro-batch, forward and backward, [device, layer]; infinite where it must not stand."""
    rows = {kind: np.add(problem.forward_s[kind], problem.backward_s[kind]) for kind in problem.forward_s}
    table = np.array([rows[device.kind] for device in problem.devices], dtype=np.float64)
    for row, device in zip(table, problem.devices, strict=True):
        row[[not problem.may_hold(device, layer) for layer in range(problem.layers)]] = np.inf
    return table


def load_bound(problem: ChainProblem) -> float:
    """A load below which no plan can bring its slowest stage; infinite if some layer may stand nowhere."""
    return least_slowest(compute_table(problem))


def rising_caps(problem: ChainProblem) -> list[float]:
    """Caps to try one after another, from the bound upwards; the last one forbids nothing."""
    table = compute_table(problem)
    total = float(np.where(np.isfinite(table), table, 0.0).max(axis=0).sum())
    cap = max(load_bound(problem) * (1 + 2 * ROUNDING), total / 1000 / len(problem.devices))
    caps, growth = [cap], 1.12
    while caps[-1] < total:
        caps.append(caps[-1] * growth)
        growth *= 1.12
    return [*caps, float("inf")]


def least_bottleneck(classes: DeviceClasses) -> ChainAnswer | None:
    """A plan with the smallest possible largest load and, among those, the smallest sum of loads; None if none fits.

    A low cap makes a pass of the dynamic programme cheap, and a pass that finds something has found the optimum.
    """
    problem = classes.problem
    if not np.isfinite(load_bound(problem)):
        return None
    for cap in rising_caps(problem):
        found = SuffixTable(classes, "max", cap).best()
        if found is not None:
            load, path = found
            slim = SuffixTable(classes, "sum", load * (1 + ROUNDING)).best()
            plan = as_plan(classes, slim[1] if slim else path)
            return ChainAnswer(plan=plan, proof=Proof(value=load, lower_bound=load, method="exact dynamic programme"))
    return None


def least_formula(
    classes: DeviceClasses, start: ChainAnswer, out_of_time: Callable[[], bool] = never
) -> tuple[ChainAnswer, list[ChainPlan]]:
    """The plan with the lowest step formula, by branch and bound over the allowed bottleneck.

    Args:
        classes: The problem.
        start: The plan of the smallest bottleneck.
        out_of_time: Asked between passes; the best plan so far is returned then, with its gap.

    Returns:
        The answer, and all plans that came up on the way: points of the frontier between sum and bottleneck.
    """
    return _FormulaSearch(classes, start).run(out_of_time)


class _FormulaSearch:
    """Intervals of the bottleneck that may still hold a better plan: (bound on the formula, low, high, sum)."""

    def __init__(self, classes: DeviceClasses, start: ChainAnswer) -> None:
        self.classes, self.problem = classes, classes.problem
        self.repeats = self.problem.micro_batches - 1
        self.least_load = start.proof.value
        self.plans = [start.plan]
        self.best = self.problem.step_formula_s(start.plan)
        self.best_plan = start.plan
        self.open: list[tuple[float, float, float, float]] = []

    def run(self, out_of_time: Callable[[], bool]) -> tuple[ChainAnswer, list[ChainPlan]]:
        # No sum of loads is lower than every layer on its fastest device.
        least_sum = float(compute_table(self.problem).min(axis=0).sum()) * (1 - ROUNDING)
        highest = (self.best - least_sum) / self.repeats if self.repeats else float("inf")
        self._look(self.least_load, highest, least_sum)
        while self.open and self.open[0][0] < self.best * (1 - ROUNDING) and not out_of_time():
            _, low, high, least_sum = heapq.heappop(self.open)
            middle = (low + high) / 2
            if high - low < 1e-3 * high:
                self._look(low, high * (1 - ROUNDING), least_sum)
            else:
                self._push(middle, high, least_sum)
                self._look(low, middle, least_sum)
        bound = min(self.best, self.open[0][0]) if self.open else self.best
        proof = Proof(value=self.best, lower_bound=bound, method="exact dynamic programme over all bottlenecks")
        return ChainAnswer(plan=self.best_plan, proof=proof), self.plans

    def _look(self, low: float, cap: float, least_sum: float) -> None:
        """Find the smallest sum with no load above the cap; what is left lies below that plan's bottleneck."""
        found = SuffixTable(self.classes, "sum", cap * (1 + ROUNDING / 4)).best()
        if found is None:
            return
        plan = as_plan(self.classes, found[1])
        self.plans.append(plan)
        value = self.problem.step_formula_s(plan)
        if value < self.best:
            self.best, self.best_plan = value, plan
        self._push(low, self.problem.max_load_s(plan), max(found[0] * (1 - ROUNDING), least_sum))

    def _push(self, low: float, high: float, least_sum: float) -> None:
        if low < high * (1 - ROUNDING):
            heapq.heappush(self.open, (least_sum + self.repeats * low, low, high, least_sum))
