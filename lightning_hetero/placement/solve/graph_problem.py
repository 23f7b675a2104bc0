"""A graph of operators, the unequal devices it could run on, and what a given placement of it costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning_hetero.errors import PlacementError

# The name of the device of every node.
GraphPlan = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDevice:
    """A device that may run any set of nodes.

    Attributes:
        name: Its name, unique in the problem.
        kind: Devices of one kind take the same times.
        memory_bytes: What it can hold.
        allowed: Nodes that may stand on it; None allows all.
    """

    name: str
    kind: str
    memory_bytes: float = float("inf")
    allowed: frozenset[int] | None = None


@dataclass(frozen=True, kw_only=True)
class GraphProblem:
    """Give every node of a graph to a device.

    What a node makes goes through host memory: its device sends it out once if any other device needs it, and every
    other device that needs it takes it in once. Both take time from the device that does it. This is the model of
    "Efficient Algorithms for Device Placement of DNN Graph Operators" (Tarnawski et al., NeurIPS 2020).

    Attributes:
        seconds: For each kind of device, the time of every node; infinite where it cannot run.
        transfer_s: For each kind of device, the time to send out or take in what a node makes; kinds left out are
            the host itself and take no time.
        size_bytes: Memory that a node takes from its device.
        edges: Pairs (maker, user).
        devices: In any order.
        together: Groups of nodes that must share a device.
        backward: Nodes of the backward pass; whether a part is contiguous is asked of the others.
        pins: Nodes that must stand on a certain device.
    """

    seconds: Mapping[str, Sequence[float]]
    transfer_s: Mapping[str, Sequence[float]]
    size_bytes: Sequence[float]
    edges: Sequence[tuple[int, int]]
    devices: tuple[GraphDevice, ...]
    together: Sequence[Collection[int]] = ()
    backward: frozenset[int] = frozenset()
    pins: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if not names or not self.nodes:
            raise PlacementError(
                f"a graph to place needs a node and a device; it has {self.nodes} nodes and {len(names)} devices"
            )
        if len(set(names)) < len(names):
            raise PlacementError(f"the devices of a graph need names of their own, got {names}")
        unknown = sorted(set(self.pins.values()) - set(names))
        if unknown:
            raise PlacementError(
                f"a node is pinned to {unknown[0]!r}, which is not among the devices {', '.join(names)}"
            )
        stray = [edge for edge in self.edges if not all(0 <= node < self.nodes for node in edge)]
        if stray:
            raise PlacementError(f"edge {stray[0]} leads out of the graph, whose nodes are 0 to {self.nodes - 1}")

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.size_bytes)

    @cached_property
    def users(self) -> tuple[frozenset[int], ...]:
        """For every node, those that use what it makes."""
        found: list[set[int]] = [set() for _ in range(self.nodes)]
        for maker, user in self.edges:
            found[maker].add(user)
        return tuple(map(frozenset, found))

    @cached_property
    def makers(self) -> tuple[frozenset[int], ...]:
        """For every node, those whose work it uses."""
        found: list[set[int]] = [set() for _ in range(self.nodes)]
        for maker, user in self.edges:
            found[user].add(maker)
        return tuple(map(frozenset, found))

    def is_host(self, device: GraphDevice) -> bool:
        """Whether the device has host memory for its own, so that it need not transfer anything."""
        return device.kind not in self.transfer_s

    def may_hold(self, device: GraphDevice, node: int) -> bool:
        """Whether the node runs on the device, and neither its own rule nor a pin keeps it away."""
        allowed = device.allowed is None or node in device.allowed
        pinned_elsewhere = self.pins.get(node, device.name) != device.name
        return allowed and not pinned_elsewhere and self.seconds[device.kind][node] < float("inf")

    @cached_property
    def fastest_s(self) -> tuple[float, ...]:
        """Of every node, its time where it is fastest; infinite if no device may hold it."""
        return tuple(
            min((self.seconds[d.kind][node] for d in self.devices if self.may_hold(d, node)), default=float("inf"))
            for node in range(self.nodes)
        )

    def way_s(self, sender: GraphDevice, receiver: GraphDevice, node: int) -> float:
        """Seconds for what a node makes to get from one device through host memory into another."""
        if sender.name == receiver.name:
            return 0.0
        return sum(self.transfer_s[d.kind][node] for d in (sender, receiver) if not self.is_host(d))

    def loads_s(self, plan: GraphPlan) -> dict[str, float]:
        """Seconds that one batch takes from every device, transfers included."""
        kinds = {device.name: device.kind for device in self.devices}
        loads = dict.fromkeys(kinds, 0.0)
        for node, home in enumerate(plan):
            loads[home] += self.seconds[kinds[home]][node]
            others = {plan[user] for user in self.users[node]} - {home}
            for name in others | ({home} if others else set()):
                if kinds[name] in self.transfer_s:
                    loads[name] += self.transfer_s[kinds[name]][node]
        return loads

    def max_load_s(self, plan: GraphPlan) -> float:
        """Time per batch of a pipeline that never drains: the load of the slowest device."""
        return max(self.loads_s(plan).values())

    def memory_bytes(self, plan: GraphPlan) -> dict[str, float]:
        """What every device holds."""
        need = {device.name: 0.0 for device in self.devices}
        for node, home in enumerate(plan):
            need[home] += self.size_bytes[node]
        return need

    def fits(self, plan: GraphPlan) -> bool:
        """Whether all nodes stand where they may, together where they must, and fit in memory."""
        devices = {device.name: device for device in self.devices}
        need = self.memory_bytes(plan)
        return (
            all(self.may_hold(devices[home], node) for node, home in enumerate(plan))
            and all(len({plan[node] for node in group}) <= 1 for group in self.together)
            and all(need[name] <= device.memory_bytes for name, device in devices.items())
        )
