"""A chain of layers, the unequal devices it could run on, and what a given split of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.solve.pipeline import (
    Schedule,
    StageCost,
    in_flight,
    max_load_s,
    step_formula_s,
    step_time_s,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainDevice:
    """A device that may run one stage.

    Attributes:
        name: Its name, unique in the problem.
        kind: Devices of one kind take the same times.
        memory_bytes: What it can hold.
        allowed: Layers that may stand on it; None allows all.
    """

    name: str
    kind: str
    memory_bytes: float
    allowed: frozenset[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLink:
    """A one-way connection: a message of b bytes takes `latency_s + b / bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float) -> float:
        """Time of one message; nothing takes no time."""
        return self.latency_s + size_bytes / self.bytes_per_s if size_bytes > 0 else 0.0


FREE = ChainLink(latency_s=0.0, bytes_per_s=float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStage:
    """Consecutive layers `first` to `stop - 1` on one device."""

    device: str
    first: int
    stop: int


ChainPlan = tuple[ChainStage, ...]


@dataclass(frozen=True, kw_only=True)
class ChainProblem:
    """Split a chain of layers into stages, each on a device of its own; devices may stay idle.

    All times and sizes are for one micro-batch.

    Attributes:
        forward_s: For each kind of device, the seconds of every layer.
        backward_s: Likewise.
        update_s: Likewise, of the optimizer, once for each batch; kinds left out take no time.
        state_bytes: Of every layer: parameters, gradients, optimizer state.
        activation_bytes: Of every layer: what it keeps from forward to backward.
        output_bytes: Of every layer: what goes to the next one; the gradient that comes back is as large.
        devices: In any order.
        links: By names of sender and receiver; a pair left out costs nothing.
        micro_batches: How many make up a batch.
        schedule: The order of forwards and backwards.
        fixed_bytes: What a device that is used holds before any layer.
        pins: Layers that must stand on a certain device.
    """

    forward_s: Mapping[str, Sequence[float]]
    backward_s: Mapping[str, Sequence[float]]
    state_bytes: Sequence[float]
    activation_bytes: Sequence[float]
    output_bytes: Sequence[float]
    devices: tuple[ChainDevice, ...]
    micro_batches: int
    schedule: Schedule = "1f1b"
    update_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    links: Mapping[tuple[str, str], ChainLink] = field(default_factory=dict)
    fixed_bytes: float = 0.0
    pins: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if not names or not self.layers or self.micro_batches < 1:
            raise PlacementError(
                "a chain to place needs at least one layer, one device and one micro-batch; it has "
                f"{self.layers} layers, {len(names)} devices and {self.micro_batches} micro-batches"
            )
        if len(set(names)) < len(names):
            raise PlacementError(f"the devices of a chain need names of their own, got {names}")
        unknown = sorted(set(self.pins.values()) - set(names))
        if unknown:
            raise PlacementError(
                f"a layer is pinned to {unknown[0]!r}, which is not among the devices {', '.join(names)}"
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.state_bytes)

    def may_hold(self, device: ChainDevice, layer: int) -> bool:
        """Whether neither the device's own rule nor a pin keeps the layer away from it."""
        allowed = device.allowed is None or layer in device.allowed
        return allowed and self.pins.get(layer, device.name) == device.name

    def send_s(self, sender: str, receiver: str, layer: int) -> float:
        """Seconds to move the output of a layer between two devices."""
        return self.links.get((sender, receiver), FREE).seconds(self.output_bytes[layer])

    def stage_costs(self, plan: ChainPlan) -> list[StageCost]:
        """The seconds of every stage of a plan."""
        kind = {device.name: device.kind for device in self.devices}
        costs = []
        for index, stage in enumerate(plan):
            here, layers = kind[stage.device], slice(stage.first, stage.stop)
            after = plan[index + 1].device if index + 1 < len(plan) else None
            before = plan[index - 1].device if index else None
            costs.append(
                StageCost(
                    forward_s=sum(self.forward_s[here][layers]),
                    backward_s=sum(self.backward_s[here][layers]),
                    send_forward_s=self.send_s(stage.device, after, stage.stop - 1) if after else 0.0,
                    send_backward_s=self.send_s(stage.device, before, stage.first - 1) if before else 0.0,
                    update_s=sum(self.update_s[here][layers]) if here in self.update_s else 0.0,
                )
            )
        return costs

    def memory_bytes(self, plan: ChainPlan) -> list[float]:
        """What every stage of a plan holds at its fullest."""
        return [
            sum(self.state_bytes[stage.first : stage.stop])
            + sum(self.activation_bytes[stage.first : stage.stop])
            * in_flight(len(plan) - 1 - index, self.micro_batches, self.schedule)
            + self.fixed_bytes
            for index, stage in enumerate(plan)
        ]

    def fits(self, plan: ChainPlan) -> bool:
        """Whether every device holds its stage and is allowed to."""
        devices = {device.name: device for device in self.devices}
        return all(
            need <= devices[stage.device].memory_bytes
            and all(self.may_hold(devices[stage.device], layer) for layer in range(stage.first, stage.stop))
            for stage, need in zip(plan, self.memory_bytes(plan), strict=True)
        )

    def max_load_s(self, plan: ChainPlan) -> float:
        """Time per micro-batch of a pipeline that never drains."""
        return max_load_s(self.stage_costs(plan))

    def step_formula_s(self, plan: ChainPlan) -> float:
        """Closed formula of the step, without the optimizer."""
        return step_formula_s(self.stage_costs(plan), self.micro_batches)

    def step_time_s(self, plan: ChainPlan) -> float:
        """Simulated step, with the optimizer."""
        return step_time_s(self.stage_costs(plan), self.micro_batches, self.schedule)
