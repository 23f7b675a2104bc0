"""Cuts an order of atoms into calls that follow each other or, where branches allow it, run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from lightning_hetero.placement.solve.graph_atoms import Atoms
from lightning_hetero.placement.solve.graph_branches import Branches
from lightning_hetero.placement.solve.graph_rows import LARGEST_TABLE, Ints, Rows

# Intervals that are looked at for branches, in all.
INTERVALS = 200_000


class Series:
    """The dynamic programme over prefixes of an order and bags of devices that were called so far.

    A step is one more call, some more atoms on a host, or calls side by side that share the branches of an interval.
    Steps follow each other, so their times add up: an upper bound of the latency.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.atoms, self.classes = atoms, atoms.device_classes
        problem, count = atoms.problem, atoms.count
        hosts = [problem.is_host(problem.devices[members[0]]) for members in self.classes]
        digits = [1 if host else len(members) + 1 for host, members in zip(hosts, self.classes, strict=True)]
        # A host can be used again and again, so using it changes no state.
        self.strides = [0 if host else prod(digits[:c]) for c, host in enumerate(hosts)]
        self.digits = digits
        self.states = prod(digits)
        longest = min(count, INTERVALS // count + 16)
        self.branches = [
            Branches(atoms, members[:1] if host else members, longest=longest)
            for host, members in zip(hosts, self.classes, strict=True)
        ]

    @property
    def too_large(self) -> bool:
        """Whether there are too many bags of devices for a table."""
        return self.states * (self.atoms.count + 1) > LARGEST_TABLE

    def _with(self, c: int, devices: int) -> Ints:
        """The states that have used so many devices of a class or more."""
        codes = np.arange(self.states)
        if not self.strides[c]:
            return codes
        return np.flatnonzero(codes // self.strides[c] % self.digits[c] >= devices)

    def solve(self, order: Sequence[int]) -> list[int] | None:
        """The device of every atom in the plan with the lowest sum of steps; None if nothing fits."""
        n, spots = len(order), range(len(self.classes))
        rows = [Rows(self.atoms, members[0], order, float("inf")) for members in self.classes]
        shared = [branches.by_stop(order) for branches in self.branches]
        states = [[self._with(c, devices) for devices in range(self.digits[c])] for c in spots]
        value = np.full((n + 1, self.states), np.inf)
        value[0] = 0.0
        came: dict[tuple[int, int], tuple[int, int, list[list[int]]]] = {}
        for stop in range(1, n + 1):
            for c in spots:
                low, load = rows[c].extend(stop)
                if low < stop:
                    after = states[c][1 if self.strides[c] else 0]
                    costs = value[low:stop, after - self.strides[c]] + load[:, None]
                    firsts = costs.argmin(axis=0)
                    for spot in np.flatnonzero(costs.min(axis=0) < value[stop, after]):
                        first, state = int(firsts[spot]), int(after[spot])
                        value[stop, state] = costs[first, spot]
                        came[stop, state] = (low + first, c, [list(order[low + first : stop])])
                for share in shared[c][stop]:
                    devices = len(share.groups)
                    after = states[c][devices]
                    costs = value[share.first, after - devices * self.strides[c]] + share.seconds
                    for spot in np.flatnonzero(costs < value[stop, after]):
                        value[stop, after[spot]] = costs[spot]
                        came[stop, int(after[spot])] = (share.first, c, share.groups)
        if not np.isfinite(value[n].min()):
            return None
        return self._walk(int(value[n].argmin()), came)

    def _walk(self, state: int, came: dict[tuple[int, int], tuple[int, int, list[list[int]]]]) -> list[int]:
        homes = [0] * self.atoms.count
        spare = [list(members) for members in self.classes]
        stop = self.atoms.count
        while stop:
            stop, c, groups = came[stop, state]
            for group in groups:
                home = spare[c].pop() if self.strides[c] else spare[c][0]
                for atom in group:
                    homes[atom] = home
            state -= self.strides[c] * len(groups)
        return homes
