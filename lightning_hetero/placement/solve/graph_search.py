"""What the searches over placements of a graph have in common: they keep the best plan and try order after order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.solve.graph_atoms import Atoms, contiguous_atoms, together_atoms
from lightning_hetero.placement.solve.graph_orders import WALKS, Orders, changed
from lightning_hetero.placement.solve.graph_problem import GraphPlan, GraphProblem
from lightning_hetero.placement.solve.proof import ROUNDING, Proof
from lightning_hetero.units import format_bytes

# Orders of one round, at most: a small graph has few.
ORDERS_PER_ATOM = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphAnswer:
    """A plan for a graph and how good it is."""

    plan: GraphPlan
    proof: Proof


class GraphSearch(ABC):
    """The best plan so far, and the order that gave the best one of contiguous parts.

    Attributes:
        parts: Atoms that make contiguous parts if an order of them is cut.
        atoms: Atoms that may be placed at will.
        bound: No plan costs less.
        value: What the best plan costs.
        random: Draws moves.
    """

    def __init__(self, problem: GraphProblem, seed: int, out_of_time: Callable[[], bool]) -> None:
        self.problem, self.out_of_time = problem, out_of_time
        # Moves have draws of their own, so that the same orders are tried with them and without.
        self._random, self.random = Random(seed), Random(f"{seed}: moves")
        self.parts, after = contiguous_atoms(problem)
        self.atoms = together_atoms(problem)
        self.bound = self.find_bound()
        self.plan: GraphPlan | None = None
        self.value = float("inf")
        self.tried, self.annealed = 0, False
        self._orders = Orders(self.parts, after)
        self._keys = [float(atom) for atom in range(self.parts.count)]
        self._row = list(range(len(problem.devices)))
        self._cut_value = float("inf")
        for device in problem.devices:
            self.keep((device.name,) * problem.nodes)

    @abstractmethod
    def find_bound(self) -> float:
        """What no plan undercuts, in seconds."""

    @abstractmethod
    def price(self, plan: GraphPlan) -> float:
        """What a plan costs, in seconds."""

    @abstractmethod
    def cut(self, order: Sequence[int], row: Sequence[int], limit: float) -> GraphPlan | None:
        """The best contiguous parts for an order of atoms and a row of devices, if they cost no more than the limit."""

    @property
    def done(self) -> bool:
        """Whether nothing better exists."""
        return self.value <= self.bound * (1 + ROUNDING)

    def cut_orders(self, positions: int) -> None:
        """Cut orders with so many positions in all, changes of the best one and new ones; at least two."""
        for _ in range(max(2, min(positions // self.parts.count, ORDERS_PER_ATOM * self.parts.count))):
            if self.done or (self.out_of_time() and self.plan is not None):
                return
            keys, row = self._keys, self._row
            if self.tried >= len(WALKS):
                keys = changed(keys, self._random, self._random.choice((1.0, 0.3, 0.1, 0.03)))
                row = _with_one_moved(row, self._random)
            order = self._orders.sorted_by(keys, WALKS[self.tried % len(WALKS)])
            plan = self.cut(order, row, self._cut_value * (1 + ROUNDING))
            self.tried += 1
            value = self.keep(plan)
            if plan is not None and value <= self._cut_value * (1 + ROUNDING):
                self._cut_value, self._keys, self._row = value, keys, row

    def begin_to_anneal(self) -> list[int] | None:
        """Device of every atom in the best plan, or in any that fits; None if there is none, or nothing to improve."""
        if self.plan is None:
            self.keep(_first_fit(self.problem, self.atoms))
        if self.plan is None or self.done or self.out_of_time():
            return None
        self.annealed = True
        return self.atoms.homes(self.plan)

    def keep(self, plan: GraphPlan | None) -> float:
        """Remember a plan if it fits and is better; say what it costs.

        It is priced anew: what a search knows is a sum of many roundings.
        """
        if plan is None or not self.problem.fits(plan):
            return float("inf")
        value = self.price(plan)
        if value < self.value:
            self.value, self.plan = value, plan
        return value

    def answer(self, what: str) -> GraphAnswer:
        """The best plan with its proof; `what` names the kind of plan that was looked for."""
        if self.plan is None:
            raise InfeasiblePlanError(_infeasible(self.problem, what))
        method = f"{self.tried} orders, each cut by a dynamic programme"
        if self.annealed:
            method += ", and simulated annealing"
        proof = Proof(value=self.value, lower_bound=min(self.value, self.bound), method=method)
        return GraphAnswer(plan=self.plan, proof=proof)


def _with_one_moved(row: Sequence[int], random: Random) -> list[int]:
    new = list(row)
    new.insert(random.randrange(len(row)), new.pop(random.randrange(len(row))))
    return new


def _first_fit(problem: GraphProblem, atoms: Atoms) -> GraphPlan | None:
    """The largest atoms first, each on the allowed device with most room; None if one does not fit."""
    room = [device.memory_bytes for device in problem.devices]
    homes = [0] * atoms.count
    for atom in sorted(range(atoms.count), key=lambda atom: -atoms.size_bytes[atom]):
        fitting = atoms.fitting(atom, room)
        if not fitting:
            return None
        homes[atom] = max(fitting, key=room.__getitem__)
        room[homes[atom]] -= atoms.size_bytes[atom]
    return atoms.plan(homes)


def _infeasible(problem: GraphProblem, what: str) -> str:
    homeless = [i for i in range(problem.nodes) if not any(problem.may_hold(d, i) for d in problem.devices)]
    if homeless:
        return (
            f"{what} of the {problem.nodes} nodes exists: no device may hold node {homeless[0]}. "
            "Allow it on some device, or add one that can run it."
        )
    need, room = sum(problem.size_bytes), sum(device.memory_bytes for device in problem.devices)
    have = "enough memory" if room == float("inf") else format_bytes(int(room))
    return (
        f"{what} of the {problem.nodes} nodes was found that fits: they need {format_bytes(int(need))}, the "
        f"{len(problem.devices)} devices have {have}, and groups, pins and allowed devices bind them. "
        "Add memory or devices, or loosen these constraints."
    )
