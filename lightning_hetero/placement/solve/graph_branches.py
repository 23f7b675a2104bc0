"""Intervals of an order that fall into branches, and how devices of one class would share these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_hetero.placement.solve.graph_atoms import Atoms

# Devices that may run branches side by side.
MOST_DEVICES = 4
# What the largest share may be of the whole: sharing must be worth the devices.
WORTH = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """An interval from position `first` on, shared by devices that work at the same time.

    Attributes:
        first: Its first position.
        seconds: Time of the slowest device.
        groups: Atoms of every device.
    """

    first: int
    seconds: float
    groups: list[list[int]]


@dataclass(slots=True, eq=False)
class _Branch:
    """Atoms of an interval that hang together by edges; `counts` tells how many atoms of each net it has."""

    seconds: float
    size_bytes: float
    counts: dict[int, int]
    atoms: list[int]


class Branches:
    """Finds the branches of intervals, for devices of one class."""

    def __init__(self, atoms: Atoms, members: Sequence[int], *, longest: int) -> None:
        """Take the indices of the devices; intervals longer than `longest` are not looked at."""
        self.atoms, self.longest = atoms, longest
        device = atoms.problem.devices[members[0]]
        self.seconds, self.net_s = atoms.seconds_on(device), atoms.net_s[device.kind]
        self.memory_bytes, self.most = device.memory_bytes, min(MOST_DEVICES, len(members))
        self.joined: list[set[int]] = [set() for _ in range(atoms.count)]
        for maker, user in atoms.problem.edges:
            one, other = atoms.atom_of[maker], atoms.atom_of[user]
            self.joined[one].add(other)
            self.joined[other].add(one)

    def by_stop(self, order: Sequence[int]) -> list[list[Shared]]:
        """For every stop, the intervals before it that are worth sharing."""
        found: list[list[Shared]] = [[] for _ in range(len(order) + 1)]
        for first in range(len(order) if self.most > 1 else 0):
            for stop, branches in self._growing(order, first):
                for devices in range(2, min(self.most, len(branches)) + 1):
                    shared = self._share(first, branches, devices)
                    if shared is not None:
                        found[stop].append(shared)
        return found

    def _growing(self, order: Sequence[int], first: int) -> Iterator[tuple[int, list[_Branch]]]:
        """The branches of all intervals from a first position on, as long as their devices could hold them."""
        home: dict[int, _Branch] = {}
        branches: list[_Branch] = []
        size_bytes = 0.0
        for spot in range(first, min(first + self.longest, len(order))):
            atom = order[spot]
            size_bytes += self.atoms.size_bytes[atom]
            if self.seconds[atom] == float("inf") or size_bytes > self.most * self.memory_bytes:
                return
            met = dict.fromkeys(home[other] for other in self.joined[atom] if other in home)
            merged = self._alone(atom)
            for branch in met:
                branches.remove(branch)
                merged = self._merge(merged, branch)
            for other in merged.atoms:
                home[other] = merged
            branches.append(merged)
            if len(branches) > 1:
                yield spot + 1, branches

    def _alone(self, atom: int) -> _Branch:
        nets = self.atoms.nets_of[atom]
        seconds = self.seconds[atom] + sum(self.net_s[net] for net in nets)
        return _Branch(seconds, self.atoms.size_bytes[atom], dict.fromkeys(nets, 1), [atom])

    def _merge(self, one: _Branch, other: _Branch) -> _Branch:
        """Both in one; a net that both touch is paid once, and not at all if they have all of it."""
        small, large = sorted((one, other), key=lambda branch: len(branch.atoms))
        large.seconds += small.seconds
        large.size_bytes += small.size_bytes
        large.atoms += small.atoms
        for net, count in small.counts.items():
            if net in large.counts:
                large.seconds -= self.net_s[net]
            large.counts[net] = large.counts.get(net, 0) + count
            if large.counts[net] == len(self.atoms.nets[net]):
                large.seconds -= self.net_s[net]
        return large

    def _share(self, first: int, branches: list[_Branch], devices: int) -> Shared | None:
        """Longest branch first, each to the device with least to do that has room; None if it is not worth it."""
        loads, rooms = [0.0] * devices, [self.memory_bytes] * devices
        groups: list[list[int]] = [[] for _ in range(devices)]
        for branch in sorted(branches, key=lambda branch: -branch.seconds):
            fitting = [device for device in range(devices) if branch.size_bytes <= rooms[device]]
            if not fitting:
                return None
            device = min(fitting, key=loads.__getitem__)
            loads[device] += branch.seconds
            rooms[device] -= branch.size_bytes
            groups[device] += branch.atoms
        if max(loads) >= WORTH * sum(loads):
            return None
        return Shared(first=first, seconds=max(loads), groups=groups)
