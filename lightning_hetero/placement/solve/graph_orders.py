"""Topological orders of a graph; depth-first ones keep together what hangs together."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from random import Random
from typing import Literal

from lightning_hetero.placement.solve.graph_atoms import Atoms

# "back" and "on" are depth-first, from the ends back and from the starts on. With "rank", the atom with the lowest key
# comes first of those that may come next; this makes every order there is.
Walk = Literal["back", "on", "rank"]
WALKS: tuple[Walk, ...] = ("back", "on", "rank")


class Orders:
    """Topological orders of the atoms, made from a key for each."""

    def __init__(self, atoms: Atoms, after: Sequence[set[int]]) -> None:
        """Take the atoms and, for every one, those it leads to."""
        self.after = after
        self.before: list[set[int]] = [set() for _ in after]
        for atom, others in enumerate(after):
            for other in others:
                self.before[other].add(atom)
        self.loose = [atom for atom in range(atoms.count) if not after[atom] and not self.before[atom]]
        self.beside = {
            atom: {other for net in atoms.nets_of[atom] for other in atoms.nets[net]} - {atom} for atom in self.loose
        }

    def sorted_by(self, keys: Sequence[float], walk: Walk) -> list[int]:
        """The order that looks at low keys first."""
        return self._by_rank(keys) if walk == "rank" else self._depth_first(keys, from_the_end=walk == "back")

    def _by_rank(self, keys: Sequence[float]) -> list[int]:
        waits = [len(before) for before in self.before]
        ready = [(keys[atom], atom) for atom, count in enumerate(waits) if not count]
        heapify(ready)
        order = []
        while ready:
            _, atom = heappop(ready)
            order.append(atom)
            for other in self.after[atom]:
                waits[other] -= 1
                if not waits[other]:
                    heappush(ready, (keys[other], other))
        return order

    def _depth_first(self, keys: Sequence[float], *, from_the_end: bool) -> list[int]:
        inward, outward = (self.after, self.before) if from_the_end else (self.before, self.after)
        # A depth-first walk names an atom once everything before it has a name.
        starts = sorted((a for a in range(len(keys)) if not inward[a] and outward[a]), key=keys.__getitem__)
        order: list[int] = []
        seen = [False] * len(keys)
        for start in starts:
            seen[start] = True
            work = [(start, iter(sorted(outward[start], key=keys.__getitem__)))]
            while work:
                atom, rest = work[-1]
                new = next((other for other in rest if not seen[other]), None)
                if new is None:
                    order.append(atom)
                    work.pop()
                else:
                    seen[new] = True
                    work.append((new, iter(sorted(outward[new], key=keys.__getitem__))))
        if not from_the_end:
            order.reverse()
        return self._with_loose(order, keys)

    def _with_loose(self, order: list[int], keys: Sequence[float]) -> list[int]:
        """Put each atom that has no forward edge right behind one that it shares a net with."""
        spots = {atom: (float(spot), 0.0) for spot, atom in enumerate(order)}
        waiting = self.loose
        while waiting:
            placed = {}
            for atom in waiting:
                friends = [other for other in self.beside[atom] if other in spots]
                if friends:
                    placed[atom] = (spots[min(friends, key=keys.__getitem__)][0] + 0.5, keys[atom])
            if not placed:
                placed = {atom: (float(len(order)), keys[atom]) for atom in waiting}
            spots.update(placed)
            waiting = [atom for atom in waiting if atom not in spots]
        return sorted(spots, key=lambda atom: (spots[atom], atom))


def changed(keys: Sequence[float], random: Random, share: float) -> list[float]:
    """The same keys, but for a share of them that is drawn anew."""
    top = float(len(keys))
    return [random.uniform(0.0, top) if random.random() < share else key for key in keys]
