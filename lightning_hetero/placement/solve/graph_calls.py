"""Latency of one batch where every accelerator is called once: inputs in, all of its nodes, outputs out."""

from __future__ import annotations

from lightning_hetero.placement.solve.graph_anneal import Placement
from lightning_hetero.placement.solve.graph_atoms import Atoms
from lightning_hetero.placement.solve.graph_problem import GraphPlan, GraphProblem


def latency_s(problem: GraphProblem, plan: GraphPlan) -> float:
    """Seconds from the first node to the last; infinite if two accelerators would have to wait for each other.

    A call begins when all its inputs are there, and nothing that it makes can be seen before its end. The host runs
    each node by itself, as soon as its inputs are there, and any number at once. This is the latency of "Efficient
    Algorithms for Device Placement of DNN Graph Operators" (Tarnawski et al., NeurIPS 2020) with one call per device.
    """
    atoms = Atoms(problem, range(problem.nodes))
    return Calls(Placement(atoms, atoms.homes(plan))).latency_s()


class Calls:
    """Calls and nodes of the host, as blocks that wait for each other; follows the moves of atoms.

    Block d is the call of device d; block D + v is node v on the host, where D is the number of devices.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        problem = placement.atoms.problem
        self.users, self.makers = problem.users, problem.makers
        self.devices = len(problem.devices)
        self.hosts = [problem.is_host(device) for device in problem.devices]
        self.host_s = [problem.seconds[device.kind] for device in problem.devices]
        self.block = [self._block(node, placement.homes[atom]) for node, atom in enumerate(placement.atoms.atom_of)]
        # How many nodes of each block, and how many edges lead from it to each other one.
        self.size = [0] * (self.devices + problem.nodes)
        self.edges: list[dict[int, int]] = [{} for _ in self.size]
        for node, block in enumerate(self.block):
            self.size[block] += 1
            for user in self.users[node]:
                self._link(block, self.block[user], 1)
        self.active = set(self.block)

    def _block(self, node: int, home: int) -> int:
        return self.devices + node if self.hosts[home] else home

    def _link(self, block: int, other: int, change: int) -> None:
        if block != other:
            links = self.edges[block]
            count = links.get(other, 0) + change
            if count:
                links[other] = count
            else:
                del links[other]

    def move(self, atom: int, target: int) -> None:
        """Move an atom to the device of the given index."""
        placement = self.placement
        placement.move(atom, target, placement.after_move(atom, target))
        for node in placement.atoms.nodes[atom]:
            old, new = self.block[node], self._block(node, target)
            self.block[node] = new
            for user in self.users[node]:
                other = self.block[user]
                self._link(old, other, -1)
                self._link(new, other, 1)
            for maker in self.makers[node]:
                other = self.block[maker]
                self._link(other, old, -1)
                self._link(other, new, 1)
            self.size[old] -= 1
            self.size[new] += 1
            self.active.add(new)
            if not self.size[old]:
                self.active.discard(old)

    def latency_s(self) -> float:
        """The longest path through the blocks; infinite if they go round in a circle."""
        waits = dict.fromkeys(self.active, 0)
        for block in waits:
            for other in self.edges[block]:
                waits[other] += 1
        ready = dict.fromkeys(waits, 0.0)
        free = [block for block, count in waits.items() if not count]
        last, done = 0.0, 0
        while free:
            block = free.pop()
            done += 1
            end = ready[block] + self._seconds(block)
            last = max(last, end)
            for other in self.edges[block]:
                ready[other] = max(ready[other], end)
                waits[other] -= 1
                if not waits[other]:
                    free.append(other)
        return last if done == len(waits) else float("inf")

    def _seconds(self, block: int) -> float:
        if block < self.devices:
            return self.placement.loads[block]
        node = block - self.devices
        home = self.placement.homes[self.placement.atoms.atom_of[node]]
        return self.host_s[home][node]
