"""Chains on devices in a given order, and a search over orders where there are too many to try all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from random import Random

import numpy as np

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.solve.chain_bottleneck import ChainAnswer, compute_table, load_bound, rising_caps
from lightning_hetero.placement.solve.chain_classes import DeviceClasses, Floats, Windows
from lightning_hetero.placement.solve.chain_problem import ChainPlan, ChainProblem, ChainStage
from lightning_hetero.placement.solve.proof import ROUNDING, Proof, never


def least_bottleneck_in_order(problem: ChainProblem, order: Sequence[str]) -> ChainAnswer | None:
    """The smallest bottleneck if the named devices are all used, in this order; None if nothing fits.

    Each device gets at least one layer. Takes time in proportion to devices x layers x layers on a device.

    Raises:
        PlacementError: The order names a device that the problem does not have, or one twice.
    """
    solver = _InOrder(problem)
    if not order or len(set(order)) < len(order) or not set(order) <= set(solver.spots):
        known, given = ", ".join(solver.spots), ", ".join(order) or "none"
        raise PlacementError(f"an order must name some of the devices {known}, each once; got {given}")
    found = solver.solve([solver.spots[name] for name in order])
    if found is None:
        return None
    load, plan = found
    proof = Proof(value=load, lower_bound=load, method="exact dynamic programme for this order of devices")
    return ChainAnswer(plan=plan, proof=proof)


def search_orders(
    problem: ChainProblem,
    *,
    formula: bool = False,
    tries: int = 300,
    seed: int = 0,
    out_of_time: Callable[[], bool] = never,
) -> ChainAnswer | None:
    """A small bottleneck over orders and choices of devices: exact cuts for each order, small changes to the order.

    Args:
        problem: Devices of too many classes for the exact programme.
        formula: Whether to look for a low step formula, among plans that have the smallest bottleneck of their order.
        tries: Orders to look at.
        seed: Of the random changes.
        out_of_time: Asked between orders.
    """
    solver, random = _InOrder(problem), Random(seed)
    price = problem.step_formula_s if formula else problem.max_load_s
    repeats = problem.micro_batches if formula else 1  # every micro-batch passes the slowest stage
    bound = load_bound(problem) * repeats
    best, plan, order = float("inf"), None, list[int]()
    for first in chain(_first_orders(problem), repeat(None, tries)):
        if plan is not None and (out_of_time() or best <= bound * (1 + ROUNDING)):
            break
        if first is None and plan is None:
            return None
        tried = first or _changed(order, len(problem.devices), problem.layers, random)
        found = solver.solve(tried, cap=None if plan is None else best / repeats)
        if found is not None and price(found[1]) <= best:
            best, plan, order = price(found[1]), found[1], tried
    if plan is None:
        return None
    proof = Proof(value=best, lower_bound=min(best, bound), method="search over device orders")
    return ChainAnswer(plan=plan, proof=proof)


def _first_orders(problem: ChainProblem) -> Iterator[list[int]]:
    """Fast devices first, last, or as given; all of them, or fewer and fewer of the slow ones."""
    table = compute_table(problem)
    speed = np.where(np.isfinite(table), table, 0.0).sum(axis=1) / np.isfinite(table).sum(axis=1).clip(1)
    by_speed = [int(spot) for spot in np.argsort(speed, kind="stable")]
    by_memory = sorted(range(len(by_speed)), key=lambda spot: -problem.devices[spot].memory_bytes)
    for number in sorted({len(by_speed), *(len(by_speed) >> shift for shift in range(1, 8))} - {0}, reverse=True):
        chosen = by_speed[: min(number, problem.layers)]
        roomy = by_memory[: min(number, problem.layers)]
        yield from (chosen, chosen[::-1], sorted(chosen), roomy, sorted(roomy))


def _changed(order: list[int], devices: int, layers: int, random: Random) -> list[int]:
    """Swap two devices, or put one elsewhere, in place of another, to rest, or to work."""
    new, idle = list(order), [spot for spot in range(devices) if spot not in set(order)]
    move = random.randrange(5)
    spot = random.randrange(len(new))
    if move == 0:
        other = random.randrange(len(new))
        new[spot], new[other] = new[other], new[spot]
    elif move == 1:
        new.insert(random.randrange(len(new)), new.pop(spot))
    elif move == 2 and idle:
        new[spot] = random.choice(idle)
    elif move == 3 and len(new) > 1:
        del new[spot]
    elif idle and len(new) < layers:
        new.insert(spot, random.choice(idle))
    return new


class _InOrder:
    """The dynamic programme for one order, with what can be kept between orders."""

    def __init__(self, problem: ChainProblem) -> None:
        self.problem = problem
        self.classes = DeviceClasses(problem, merge=False)
        self.spots = {device.name: spot for spot, device in enumerate(problem.devices)}
        self.windows: dict[int, tuple[float, list[Windows]]] = {}

    def solve(self, order: list[int], cap: float | None = None) -> tuple[float, ChainPlan] | None:
        """The smallest largest load, at most `cap`, and its plan."""
        for limit in [cap] if cap is not None else rising_caps(self.problem):
            tables = self._tables(order, limit)
            if np.isfinite(tables[0][0]):
                return float(tables[0][0]), self._walk(order, tables, limit)
        return None

    def _tables(self, order: list[int], cap: float) -> list[Floats]:
        """For each position, the best largest load from a layer on with the devices from there on."""
        n = self.problem.layers
        after = np.full(n + 1, np.inf)
        after[n] = 0.0
        tables = [after]
        for position in range(len(order) - 1, -1, -1):
            best = np.full(n + 1, np.inf)
            for windows, value in self._prices(order, position, tables[0], cap):
                width = len(value)
                np.minimum(best[:width], value, out=best[:width])
                del windows
            tables.insert(0, best)
        return tables

    def _prices(self, order: list[int], position: int, after: Floats, cap: float) -> Iterator[tuple[Windows, Floats]]:
        """For each length of a stage, the largest load from its first layer on."""
        here, n, send = order[position], self.problem.layers, self.classes.send_s
        out = send[here, order[position + 1]] if position + 1 < len(order) else np.zeros(n + 1)
        back = send[here, order[position - 1]] if position else np.zeros(n + 1)
        for windows in self._windows(here, cap):
            width = n - windows.length + 1
            load = windows.compute_s + out[windows.length :] + back[:width]
            fits = self.classes.fits(here, windows, len(order) - 1 - position) & (load <= cap)
            yield windows, np.where(fits, np.maximum(load, after[windows.length :]), np.inf)

    def _windows(self, spot: int, cap: float) -> list[Windows]:
        if spot not in self.windows or self.windows[spot][0] < cap:
            self.windows[spot] = cap, self.classes.windows(spot, cap)
        return self.windows[spot][1]

    def _walk(self, order: list[int], tables: list[Floats], cap: float) -> ChainPlan:
        stages, first = [], 0
        for position, spot in enumerate(order):
            target = tables[position][first]
            prices = self._prices(order, position, tables[position + 1], cap)
            length = next(w.length for w, value in prices if first < len(value) and value[first] == target)
            device = self.problem.devices[spot].name
            stages.append(ChainStage(device=device, first=first, stop=first + length))
            first += length
        return tuple(stages)
