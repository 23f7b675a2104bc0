"""Cuts an order of atoms into intervals, one for each device: exact for that order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.placement.solve.graph_atoms import Atoms
from lightning_hetero.placement.solve.graph_rows import LARGEST_TABLE, Floats, Ints, Rows


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One more device for many states at once.

    Attributes:
        classes: Class of the device that each state adds; or one class, if it is the same for all.
        states: Those that have the device.
        rests: What each of them was before.
    """

    classes: list[int]
    states: Ints
    rests: Ints


class Intervals:
    """The dynamic programme over prefixes of an order and devices used so far.

    Devices that agree in kind, memory and allowed atoms are of one class, and a state is a bag: a number of each
    class. With too many bags for the table, the devices stand in a row and a state is how many of them are used up.
    """

    def __init__(self, atoms: Atoms, row: Sequence[int] | None = None) -> None:
        """Sort the devices into classes; `row` are their indices in the order to use them if there is no other way."""
        self.atoms, self.classes = atoms, atoms.device_classes
        self.row = list(row or range(len(atoms.problem.devices)))
        bags = prod(len(members) + 1 for members in self.classes)
        self.in_row = bags * (atoms.count + 1) > LARGEST_TABLE
        self.states = len(self.row) + 1 if self.in_row else bags
        self.steps = [self._row_step()] if self.in_row else self._bag_steps()

    def _bag_steps(self) -> list[_Step]:
        counts = [len(members) for members in self.classes]
        strides = np.cumprod([1, *(count + 1 for count in counts)])
        codes = np.arange(self.states)
        bags = [np.flatnonzero(codes // strides[c] % (count + 1) > 0) for c, count in enumerate(counts)]
        return [_Step([c], bags[c], bags[c] - strides[c]) for c in range(len(counts))]

    def _row_step(self) -> _Step:
        class_of = {device: c for c, members in enumerate(self.classes) for device in members}
        states = np.arange(1, self.states)
        return _Step([class_of[device] for device in self.row], states, states - 1)

    def solve(self, order: Sequence[int], cap: float) -> tuple[float, list[int]] | None:
        """The smallest largest load below the cap, and the device of every atom; None if there is none."""
        n = len(order)
        rows = [Rows(self.atoms, members[0], order, cap) for members in self.classes]
        value = np.full((n + 1, self.states), np.inf)
        value[0] = 0.0
        came_from = np.zeros((n + 1, self.states), dtype=np.int32)
        came_by = np.zeros((n + 1, self.states), dtype=np.int16)
        for stop in range(1, n + 1):
            loads = [row.extend(stop) for row in rows]
            for number, step in enumerate(self.steps):
                low, load = _side_by_side([loads[c] for c in step.classes], stop)
                if low >= stop:
                    continue
                costs = np.maximum(value[low:stop, step.rests], load)
                first = costs.argmin(axis=0)
                best = costs[first, np.arange(len(first))]
                better = best < value[stop, step.states]
                chosen = step.states[better]
                value[stop, chosen] = best[better]
                came_from[stop, chosen] = first[better] + low
                came_by[stop, chosen] = number
            if self.in_row:  # a device in the row may stay idle
                np.minimum.accumulate(value[stop], out=value[stop])
        if value[n].min() >= cap:
            return None
        return float(value[n].min()), self._walk(order, value, came_from, came_by)

    def _walk(
        self, order: Sequence[int], value: Floats, came_from: NDArray[np.int32], came_by: NDArray[np.int16]
    ) -> list[int]:
        homes = [0] * self.atoms.count
        spare = [list(members) for members in self.classes]
        stop, state = len(order), int(value[-1].argmin())
        while stop:
            if self.in_row:  # the first state with this value is the one that has it by a step and not by idling
                state = int(np.argmax(value[stop] == value[stop, state]))
            step, first = self.steps[came_by[stop, state]], int(came_from[stop, state])
            home = self.row[state - 1] if self.in_row else spare[step.classes[0]].pop()
            for atom in order[first:stop]:
                homes[atom] = home
            state = int(step.rests[np.searchsorted(step.states, state)])
            stop = first
        return homes


def _side_by_side(loads: list[tuple[int, Floats]], stop: int) -> tuple[int, Floats]:
    """Loads from a common lowest first position on, a column for each device; infinite where one must not begin."""
    if len(loads) == 1:
        return loads[0][0], loads[0][1][:, None]
    low = min(first for first, _ in loads)
    table = np.full((stop - low, len(loads)), np.inf)
    for column, (first, load) in enumerate(loads):
        table[first - low :, column] = load
    return low, table
