"""Heterogeneous Earliest Finish Time: list scheduling for unequal devices (Topcuoglu, Hariri and Wu, 2002)."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement.solve.bounds import critical_path
from lightning_hetero.placement.solve.graph_atoms import together_atoms
from lightning_hetero.placement.solve.graph_problem import GraphPlan, GraphProblem
from lightning_hetero.placement.solve.proof import Proof
from lightning_hetero.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeftAnswer:
    """A schedule of one batch.

    Attributes:
        plan: Device of every node.
        start_s: When every node starts.
        end_s: When every node ends.
        proof: Its value is the end of the last node.
    """

    plan: GraphPlan
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]
    proof: Proof


def heft(problem: GraphProblem) -> HeftAnswer:
    """Schedule the nodes one by one, those with the longest way to the end first, each where it ends earliest.

    A device runs one node at a time. What a node makes goes out of its device and into another one while both work
    on; this takes the sum of both transfers. A node may be put between two that are scheduled already.

    Raises:
        InfeasiblePlanError: A node, or the group it must stay together with, fits on no device any more.
        PlacementError: The graph has a cycle.

    Example:
        >>> from lightning_hetero.placement.solve import GraphDevice, GraphProblem
        >>> gpus = tuple(GraphDevice(name=f"gpu:{i}", kind="gpu") for i in range(2))
        >>> diamond = GraphProblem(seconds={"gpu": [1.0, 4.0, 4.0, 1.0]}, transfer_s={"gpu": [0.5] * 4},
        ...                        size_bytes=[1] * 4, edges=[(0, 1), (0, 2), (1, 3), (2, 3)], devices=gpus)
        >>> answer = heft(diamond)
        >>> answer.plan, answer.start_s, answer.proof.value
        (('gpu:0', 'gpu:0', 'gpu:1', 'gpu:1'), (0.0, 1.0, 2.0, 6.0), 7.0)
    """
    atoms = together_atoms(problem)
    home: dict[int, int] = {}
    room = [device.memory_bytes for device in problem.devices]
    busy: list[list[tuple[float, float]]] = [[] for _ in problem.devices]
    start_s, end_s = [0.0] * problem.nodes, [0.0] * problem.nodes
    for node in _by_rank(problem):
        atom = atoms.atom_of[node]
        candidates = [home[atom]] if atom in home else atoms.fitting(atom, room)
        if not candidates:
            raise InfeasiblePlanError(
                f"node {node} needs {format_bytes(int(atoms.size_bytes[atom]))} with those it must stay together with, "
                "and no allowed device has that much left. Add memory or devices, or loosen pins and allowed devices."
            )
        slots = {}
        for spot in candidates:
            device = problem.devices[spot]
            arrivals = [
                end_s[maker] + problem.way_s(problem.devices[home[atoms.atom_of[maker]]], device, maker)
                for maker in problem.makers[node]
            ]
            slots[spot] = _first_gap(busy[spot], max(arrivals, default=0.0), problem.seconds[device.kind][node])
        best = min(slots, key=lambda spot: slots[spot][1])
        if atom not in home:
            home[atom] = best
            room[best] -= atoms.size_bytes[atom]
        start_s[node], end_s[node] = slots[best]
        insort(busy[best], slots[best])
    plan = atoms.plan([home[atom] for atom in range(atoms.count)])
    bound = critical_path(problem.fastest_s, problem.users)
    proof = Proof(value=max(end_s), lower_bound=min(bound, max(end_s)), method="HEFT")
    return HeftAnswer(plan=plan, start_s=tuple(start_s), end_s=tuple(end_s), proof=proof)


def _first_gap(busy: list[tuple[float, float]], ready_s: float, seconds: float) -> tuple[float, float]:
    """Start and end of the first time, not before `ready_s`, in which a device is free for so long."""
    start = ready_s
    for begin, end in busy:
        if start + seconds <= begin:
            break
        start = max(start, end)
    return start, start + seconds


def _by_rank(problem: GraphProblem) -> list[int]:
    """All nodes, those with the longest way to the end first ("upward rank"), and makers before their users."""
    rank = [0.0] * problem.nodes
    waits = [len(users) for users in problem.users]
    free = [node for node, count in enumerate(waits) if not count]
    backwards = []
    while free:
        node = free.pop()
        backwards.append(node)
        able = [device for device in problem.devices if problem.may_hold(device, node)] or problem.devices
        rank[node] = sum(problem.seconds[device.kind][node] for device in able) / len(able)
        if problem.users[node]:
            ways = [problem.way_s(one, other, node) for one in able for other in problem.devices]
            rank[node] += sum(ways) / len(ways) + max(rank[user] for user in problem.users[node])
        for maker in problem.makers[node]:
            waits[maker] -= 1
            if not waits[maker]:
                free.append(maker)
    if len(backwards) < problem.nodes:
        raise PlacementError("the graph goes round in a circle, so its nodes cannot be scheduled one after the other")
    backwards.reverse()  # makers first: sorting keeps this among nodes of one rank
    return sorted(backwards, key=lambda node: -rank[node])
