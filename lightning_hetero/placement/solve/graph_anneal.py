"""Moves atoms between devices one by one, uphill at first and less and less so (simulated annealing)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from random import Random

from lightning_hetero.placement.solve.graph_atoms import Atoms
from lightning_hetero.placement.solve.proof import ROUNDING, never

# Moves between two questions whether time is out.
MOVES_AT_ONCE = 2000
# Share of moves without another atom that comes back in exchange, where there is room.
ALONE = 0.9
# Loads count as no more than this many times the first one: powers of more than that would overflow.
LARGEST = 1e6


class Placement:
    """Where every atom stands, with loads that follow each move."""

    def __init__(self, atoms: Atoms, homes: Sequence[int]) -> None:
        devices = atoms.problem.devices
        self.atoms, self.homes = atoms, list(homes)
        self.seconds = [atoms.seconds[device.kind] for device in devices]
        self.net_s = [atoms.net_s[device.kind] for device in devices]
        self.allowed = [atoms.allowed[device.name] for device in devices]
        self.room_bytes = [device.memory_bytes for device in devices]
        self.sizes = [len(net) for net in atoms.nets]
        # How many atoms of every net stand on every device.
        self.members = [[0] * len(devices) for _ in atoms.nets]
        self.loads = [0.0] * len(devices)
        for atom, home in enumerate(homes):
            self.loads[home] += self.seconds[home][atom]
            self.room_bytes[home] -= atoms.size_bytes[atom]
            for net in atoms.nets_of[atom]:
                self.members[net][home] += 1
        for net, counts in enumerate(self.members):
            for home, count in enumerate(counts):
                if 0 < count < self.sizes[net]:
                    self.loads[home] += self.net_s[home][net]

    def fits(self, atom: int, target: int) -> bool:
        """Whether the target may hold the atom and has room for it."""
        return self.allowed[target][atom] and self.atoms.size_bytes[atom] <= self.room_bytes[target]

    def swap_fits(self, atom: int, other: int) -> bool:
        """Whether two atoms may take each other's place."""
        home, target = self.homes[atom], self.homes[other]
        grows = self.atoms.size_bytes[other] - self.atoms.size_bytes[atom]
        allowed = self.allowed[target][atom] and self.allowed[home][other]
        return allowed and -self.room_bytes[target] <= grows <= self.room_bytes[home]

    def after_move(self, atom: int, target: int) -> tuple[float, float]:
        """Loads of the atom's device and of the target once the atom has moved; no other load changes."""
        home = self.homes[atom]
        left, reached = self.loads[home] - self.seconds[home][atom], self.loads[target] + self.seconds[target][atom]
        for net in self.atoms.nets_of[atom]:
            counts, size = self.members[net], self.sizes[net]
            here, there = counts[home], counts[target]
            # A device pays for a net of which it holds some and not all.
            if here == 1:
                left -= self.net_s[home][net]
            elif here == size:
                left += self.net_s[home][net]
            if there == 0:
                reached += self.net_s[target][net]
            if there + 1 == size:
                reached -= self.net_s[target][net]
        return left, reached

    def move(self, atom: int, target: int, loads: tuple[float, float]) -> None:
        """Move the atom; `loads` is what `after_move` said."""
        home = self.homes[atom]
        self.loads[home], self.loads[target] = loads
        self.room_bytes[home] += self.atoms.size_bytes[atom]
        self.room_bytes[target] -= self.atoms.size_bytes[atom]
        self.homes[atom] = target
        for net in self.atoms.nets_of[atom]:
            self.members[net][home] -= 1
            self.members[net][target] += 1


def anneal(
    placement: Placement,
    random: Random,
    *,
    moves: int,
    heat: float,
    power: float,
    out_of_time: Callable[[], bool] = never,
) -> list[int]:
    """Move random atoms to devices of their neighbours, or swap two; the energy is the sum of the loads to a power.

    A high power looks at the slowest device only, a low one also at how far the others are behind it.

    Args:
        placement: Where to begin; it is changed.
        random: Draws the moves.
        moves: How many to try.
        heat: Energy by which moves may go uphill at first; a slowest device alone has the energy 1. It falls to a
            300th.
        power: Of the loads.
        out_of_time: Asked now and then.

    Returns:
        The device of every atom where the largest load was smallest.
    """
    draw, homes, loads, count = random.random, placement.homes, placement.loads, placement.atoms.count
    best, best_homes = max(loads), list(homes)
    scale, warmth = 1 / best if best > 0 else 1.0, heat
    for done in range(moves):
        if done % MOVES_AT_ONCE == 0:
            if out_of_time():
                break
            warmth = heat * 300 ** (-done / moves)
        atom = int(draw() * count)
        home, target = homes[atom], _target(placement, atom, draw)
        if target == home:
            continue
        before = loads[home], loads[target]
        other = None
        if draw() < ALONE and placement.fits(atom, target):
            after = placement.after_move(atom, target)
        else:
            other = int(draw() * count)
            if homes[other] != target or not placement.swap_fits(atom, other):
                continue
            placement.move(atom, target, placement.after_move(atom, target))
            after = placement.after_move(other, home)[::-1]
        change = _energy(after, scale, power) - _energy(before, scale, power)
        if change <= 0 or draw() < exp(-change / warmth):
            if other is None:
                placement.move(atom, target, after)
            else:
                placement.move(other, home, after[::-1])
            if max(after) < best and max(loads) < best * (1 - ROUNDING):
                best, best_homes = max(loads), list(homes)
        elif other is not None:
            placement.move(atom, home, before[::-1])
    return best_homes


def _target(placement: Placement, atom: int, draw: Callable[[], float]) -> int:
    """Mostly the device of a neighbour."""
    nets_of = placement.atoms.nets_of[atom]
    if nets_of and draw() < 0.8:
        net = placement.atoms.nets[nets_of[int(draw() * len(nets_of))]]
        return placement.homes[net[int(draw() * len(net))]]
    return int(draw() * len(placement.loads))


def _energy(loads: tuple[float, float], scale: float, power: float) -> float:
    one, other = loads
    return float(min(one * scale, LARGEST) ** power + min(other * scale, LARGEST) ** power)
