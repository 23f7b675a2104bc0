"""The graph as the search sees it: atoms that stand together, and nets that cost what they cross."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from lightning_hetero.placement.solve.graph_problem import GraphDevice, GraphPlan, GraphProblem


class Atoms:
    """Nodes merged into atoms, which are placed as one.

    What a node makes concerns its own atom and those of its users: a net. A device pays for a net if it holds some of
    it and not all of it, and this is all that transfers cost.

    Attributes:
        problem: The graph.
        atom_of: Atom of every node.
        count: Number of atoms.
        seconds: For each kind of device, the time of every atom.
        size_bytes: Of every atom.
        allowed: For every device, whether each atom may stand on it.
        nets: The atoms of every net, ascending, two or more.
        net_s: For each kind of device, what it pays for every net.
        nets_of: For every atom, the nets that it is in.
        nodes: Of every atom.
    """

    def __init__(self, problem: GraphProblem, atom_of: Sequence[int]) -> None:
        self.problem, self.atom_of, self.count = problem, list(atom_of), max(atom_of) + 1
        self.nodes: list[list[int]] = [[] for _ in range(self.count)]
        for node, atom in enumerate(atom_of):
            self.nodes[atom].append(node)
        kinds = {device.kind for device in problem.devices}
        self.seconds = {kind: self._sums(problem.seconds[kind]) for kind in kinds}
        self.size_bytes = self._sums(problem.size_bytes)
        self.allowed = {device.name: [True] * self.count for device in problem.devices}
        for device in problem.devices:
            for node, atom in enumerate(atom_of):
                if not problem.may_hold(device, node):
                    self.allowed[device.name][atom] = False
        merged: dict[tuple[int, ...], list[int]] = {}
        for node, users in enumerate(problem.users):
            net = tuple(sorted({atom_of[node], *(atom_of[user] for user in users)}))
            if len(net) > 1:
                merged.setdefault(net, []).append(node)
        none = [0.0] * problem.nodes
        costs = {kind: problem.transfer_s.get(kind, none) for kind in kinds}
        paid = [net for net, makers in merged.items() if any(cost[node] for cost in costs.values() for node in makers)]
        self.nets = paid
        self.net_s = {kind: [sum(cost[node] for node in merged[net]) for net in paid] for kind, cost in costs.items()}
        self.nets_of: list[list[int]] = [[] for _ in range(self.count)]
        for index, net in enumerate(paid):
            for atom in net:
                self.nets_of[atom].append(index)

    def _sums(self, values: Sequence[float]) -> list[float]:
        sums = [0.0] * self.count
        for atom, value in zip(self.atom_of, values, strict=True):
            sums[atom] += value
        return sums

    @cached_property
    def device_classes(self) -> list[list[int]]:
        """Indices of devices that agree in kind, memory and allowed atoms."""
        found: dict[object, list[int]] = {}
        for spot, device in enumerate(self.problem.devices):
            same = (device.kind, device.memory_bytes, tuple(self.allowed[device.name]))
            found.setdefault(same, []).append(spot)
        return list(found.values())

    def seconds_on(self, device: GraphDevice) -> list[float]:
        """Time of every atom on a device; infinite where it must not stand."""
        allowed = self.allowed[device.name]
        return [time if ok else float("inf") for time, ok in zip(self.seconds[device.kind], allowed, strict=True)]

    def fitting(self, atom: int, room_bytes: Sequence[float]) -> list[int]:
        """Indices of the devices that may hold an atom and have room for it."""
        return [
            spot
            for spot, device in enumerate(self.problem.devices)
            if self.allowed[device.name][atom] and self.size_bytes[atom] <= room_bytes[spot]
        ]

    def homes(self, plan: GraphPlan) -> list[int]:
        """Index of the device of every atom."""
        spots = {device.name: spot for spot, device in enumerate(self.problem.devices)}
        homes = [0] * self.count
        for atom, name in zip(self.atom_of, plan, strict=True):
            homes[atom] = spots[name]
        return homes

    def plan(self, homes: Sequence[int]) -> GraphPlan:
        """The plan that puts every atom on the device of the given index."""
        return tuple(self.problem.devices[homes[atom]].name for atom in self.atom_of)


def together_atoms(problem: GraphProblem) -> Atoms:
    """One atom for each group of nodes that must share a device."""
    return Atoms(problem, _numbered(_joined(problem)))


def contiguous_atoms(problem: GraphProblem) -> tuple[Atoms, list[set[int]]]:
    """Atoms such that the forward edges between them make no cycle, and for every atom those it leads to.

    A path that leaves a group that must stay together and comes back would make its device wait for another one in
    the middle of its work. So everything on such a path joins the group.
    """
    atom_of = _numbered(_joined(problem))
    after = _followers(problem, atom_of)
    merged = _components(after)
    atom_of = _numbered([merged[atom] for atom in atom_of])
    return Atoms(problem, atom_of), _followers(problem, atom_of)


def _joined(problem: GraphProblem) -> list[int]:
    """For every node, one and the same node of its group (union-find)."""
    parent = list(range(problem.nodes))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for group in problem.together:
        first, *rest = sorted(group)
        for node in rest:
            parent[root(node)] = root(first)
    return [root(node) for node in range(problem.nodes)]


def _numbered(labels: Iterable[int]) -> list[int]:
    """The same groups, numbered from 0 in order of appearance."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def _followers(problem: GraphProblem, atom_of: Sequence[int]) -> list[set[int]]:
    after: list[set[int]] = [set() for _ in range(max(atom_of) + 1)]
    for maker, user in problem.edges:
        if maker in problem.backward or user in problem.backward or atom_of[maker] == atom_of[user]:
            continue
        after[atom_of[maker]].add(atom_of[user])
    return after


def _components(after: Sequence[Iterable[int]]) -> list[int]:
    """Number of the strongly connected component of every atom (Tarjan 1972, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    component = [-1] * len(after)
    stack: list[int] = []
    for start in range(len(after)):
        work = [(start, iter(after[start]))] if start not in index else []
        if work:
            index[start] = low[start] = len(index)
            stack.append(start)
        while work:
            atom, rest = work[-1]
            new = next((other for other in rest if other not in index or component[other] < 0), None)
            if new is not None and new not in index:
                index[new] = low[new] = len(index)
                stack.append(new)
                work.append((new, iter(after[new])))
            elif new is not None:
                low[atom] = min(low[atom], index[new])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[atom])
                if low[atom] == index[atom]:
                    while component[atom] < 0:
                        component[stack.pop()] = index[atom]
    return component
