"""What a device would have to do with each interval of an order of atoms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.placement.solve.graph_atoms import Atoms

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Numbers in the table of a dynamic programme: 160 MB.
LARGEST_TABLE = 20_000_000


class Rows:
    """Load of a device with the atoms from any first position up to a growing stop."""

    def __init__(self, atoms: Atoms, device: int, order: Sequence[int], cap: float) -> None:
        here = atoms.problem.devices[device]
        seconds, net_s = atoms.seconds[here.kind], atoms.net_s[here.kind]
        allowed = atoms.allowed[here.name]
        self.cap = cap
        self.work = np.concatenate([[0.0], np.cumsum([seconds[atom] if allowed[atom] else 0.0 for atom in order])])
        size = np.concatenate([[0.0], np.cumsum([atoms.size_bytes[atom] for atom in order])])
        # The first position from which the atoms up to a stop fit in memory and in the cap, and all are allowed.
        forbidden = [spot + 1 if not allowed[atom] else 0 for spot, atom in enumerate(order)]
        self.low = np.maximum.reduce(
            [
                np.searchsorted(size, size[1:] - here.memory_bytes),
                np.searchsorted(self.work, self.work[1:] - cap),
                np.maximum.accumulate(forbidden),
            ]
        )
        self.transfer = np.zeros(len(order) + 1)
        self.changes = self._changes(atoms, order, net_s) if any(net_s) else [[] for _ in order]

    def _changes(
        self, atoms: Atoms, order: Sequence[int], net_s: Sequence[float]
    ) -> list[list[tuple[int, int, float]]]:
        """What the atom at a position adds to the transfers, as (lowest first position, highest, seconds).

        A net is touched once the interval reaches back to no more than its last member so far, and no longer crossed
        once it reaches back to its first member and has them all.
        """
        spots = [0] * len(order)
        for spot, atom in enumerate(order):
            spots[atom] = spot
        changes: list[list[tuple[int, int, float]]] = [[] for _ in order]
        for net, seconds in zip(atoms.nets, net_s, strict=True):
            if seconds:
                members = sorted(spots[atom] for atom in net)
                for previous, spot in zip([-1, *members], members, strict=False):
                    changes[spot].append((previous + 1, spot, seconds))
                changes[members[-1]].append((0, members[0], -seconds))
        return changes

    def extend(self, stop: int) -> tuple[int, Floats]:
        """Take the atom at `stop - 1` too; the loads of all intervals from the lowest possible first position on."""
        low = int(self.low[stop - 1])
        transfer = self.transfer
        for first, last, seconds in self.changes[stop - 1]:
            if last >= low:
                transfer[max(first, low) : last + 1] += seconds
        load: Floats = self.work[stop] - self.work[low:stop] + transfer[low:stop]
        return low, load
