"""Moves groups of atoms between devices to lower the latency, uphill at first (simulated annealing)."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from random import Random

from lightning_hetero.placement.solve.graph_calls import Calls
from lightning_hetero.placement.solve.proof import ROUNDING, never

# Moves between two questions whether time is out.
MOVES_AT_ONCE = 200


def anneal_groups(
    calls: Calls,
    random: Random,
    *,
    moves: int,
    heat: float,
    largest: int,
    out_of_time: Callable[[], bool] = never,
) -> list[int]:
    """Move random groups of atoms that hang together to devices of their neighbours.

    Args:
        calls: Where to begin; it is changed.
        random: Draws the moves.
        moves: How many to try.
        heat: By what part of the latency moves may go uphill at first; it falls to a 300th.
        largest: Atoms in a group.
        out_of_time: Asked now and then.

    Returns:
        The device of every atom where the latency was lowest.
    """
    placement = calls.placement
    now = best = calls.latency_s()
    best_homes = list(placement.homes)
    scale = heat * best
    for done in range(moves):
        if done % MOVES_AT_ONCE == 0:
            if out_of_time():
                break
            warmth = scale * 300 ** (-done / moves)
        seed = random.randrange(placement.atoms.count)
        home, target = placement.homes[seed], _target(calls, seed, random)
        if home == target:
            continue
        group = _group(calls, seed, random.randint(1, largest), random)
        moved = _move(calls, group, target)
        value = calls.latency_s() if moved == len(group) else float("inf")
        if value <= now or random.random() < exp((now - value) / warmth):
            now = value
            if now < best * (1 - ROUNDING):
                best, best_homes = now, list(placement.homes)
        else:
            for atom in reversed(group[:moved]):
                calls.move(atom, home)
    return best_homes


def _target(calls: Calls, atom: int, random: Random) -> int:
    """Mostly the device of a neighbour."""
    atoms, homes = calls.placement.atoms, calls.placement.homes
    nets = atoms.nets_of[atom]
    if nets and random.random() < 0.9:
        return homes[random.choice(atoms.nets[random.choice(nets)])]
    return random.randrange(calls.devices)


def _group(calls: Calls, seed: int, size: int, random: Random) -> list[int]:
    """An atom and others of its device that it hangs together with."""
    atoms, homes = calls.placement.atoms, calls.placement.homes
    group, edge, seen = [seed], [seed], {seed}
    while edge and len(group) < size:
        atom = edge.pop(random.randrange(len(edge)))
        for net in atoms.nets_of[atom]:
            for other in atoms.nets[net]:
                if other not in seen and homes[other] == homes[seed]:
                    seen.add(other)
                    edge.append(other)
                    group.append(other)
    return group[:size]


def _move(calls: Calls, group: list[int], target: int) -> int:
    """Move one atom after the other as long as they fit; say how many did."""
    for done, atom in enumerate(group):
        if not calls.placement.fits(atom, target):
            return done
        calls.move(atom, target)
    return len(group)
