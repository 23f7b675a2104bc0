"""What a model costs on the devices of an inventory, looked up once, so that a plan is priced quickly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.plan.build import loose_need, unit_need
from lightning_hetero.profile.costs import OWN_CODE, Curve, Line, ModelProfile, UnitCost

DEFAULT_BYTES_PER_S = 8e9
DEFAULT_LATENCY_S = 20e-6
"""Of links that nobody measured: half of what PCIe 3.0 x16 has, so that a transfer is not taken for free."""


class Flow(NamedTuple):
    """A flow of the profile, by indices; -1 stands for own code, and for no module or unit."""

    source: int
    target: int
    size_bytes: Line
    chained: bool  # to own code: no, see `leaves_chain`
    has_gradient: bool
    around: int
    taken_before: int = -1
    leaves_chain: bool = False


class Entering(NamedTuple):
    """A tensor that a module is called with, by indices as in `Flow`; see `lightning_hetero.profile.costs.Entering`.

    Attributes:
        module: Index of the module in `Costs.around`.
        tensor: Number of the tensor.
        source: Index of the unit that made it.
        taken_before: Index of the unit that took it first, before.
        taken_inside: Whether there is a flow for it.
        around: Index of the module that holds the maker and this module.
        size_bytes: Its size.
    """

    module: int
    tensor: int
    source: int
    taken_before: int
    taken_inside: bool
    around: int
    size_bytes: Line


class Code(NamedTuple):
    """Own code between units, by indices as in `Flow`; see `lightning_hetero.profile.costs.OwnCode`.

    Attributes:
        around: Index of the module whose code it is; -1 for the model itself.
        after: Index of the unit that was called last before.
        kept: Size, maker and takers of what it keeps.
        moment_bytes: What its backward needs for a moment.
    """

    around: int
    after: int
    kept: tuple[tuple[Line, int, tuple[int, ...]], ...]
    moment_bytes: Line


class Wait(NamedTuple):
    """A gradient that waits during the backwards of units, by the indices of the first and the last of them."""

    around: int
    source: int
    first: int
    last: int
    size_bytes: Line


class Path(NamedTuple):
    """What a link takes: a message of b bytes `latency_s + b * s_per_byte`."""

    latency_s: float
    s_per_byte: float


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds for one number of rows; nan where nothing is known.

    Attributes:
        forward_s: Of every unit on every device, by indices, shape (devices, units).
        backward_s: Likewise; zeros without training.
        own_forward_s: Of the model's own code, on the root.
        own_backward_s: Likewise.
    """

    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    own_forward_s: float
    own_backward_s: float


class Costs:
    """Everything that `predict` needs and that does not depend on the plan. Make it once, predict often.

    Args:
        graph: The model.
        inventory: The devices and links.
        profile: Seconds and bytes of the model's units.
        training: Whether there is a backward and an optimizer step.
        optimizer_factor: Bytes of optimizer state for each byte of trained parameter.
        defers_batch_norm: Whether micro-batches are normalised by their own mean and variance.
        accumulates: Whether gradients of batches before may be there in a backward. With True, predictions of memory
            hold in any case.

    Attributes:
        is_coupled: Whether rows depend on each other, so that "forward" runs batches whole.
        units: The units that are called, in the order of their first call. Others cost memory and no time.
        flows: What passes between them.
        entering: What modules are called with.
        code: The model's own code between them.
        waiting: Gradients that wait for others.
        around: The names of the units below each module that the profile speaks of.
        called_in: Those of them that are called, by index.
        in_chain: Units that are called in an `nn.Sequential`.
        inputs: Bytes of the inputs of each unit.
        kept: What autograd keeps of each unit, its inputs included.
        paths: What links take, by indices of sender and receiver.
        root: Index of the root device.
        limits: Bytes that a plan may use of each device.

    Raises:
        ProfileError: The profile is of another model.
        InventoryError: No device can train.
    """

    def __init__(
        self,
        graph: ModelGraph,
        inventory: Inventory,
        profile: ModelProfile,
        training: bool = True,
        optimizer_factor: float = 2.0,
        defers_batch_norm: bool = False,
        accumulates: bool = True,
    ) -> None:
        self.graph = graph
        self.inventory = inventory
        self.profile = profile
        self.training = training
        self.optimizer_factor = optimizer_factor
        self.accumulates = accumulates
        self.is_coupled = bool(profile.coupled) and training and not defers_batch_norm
        self.devices = inventory.names
        self.limits = tuple(device.memory_bytes for device in inventory)
        self.root = self.devices.index(inventory.root.name)
        self.units: tuple[UnitCost, ...] = profile.units
        self._check()
        self.index_of = {unit.name: index for index, unit in enumerate(self.units)}
        self.state_bytes = {unit.name: unit_need(unit, training, optimizer_factor).total_bytes for unit in graph.units}
        self.loose_bytes = loose_need(graph, training, optimizer_factor).total_bytes
        self.trained_bytes = tuple(graph[unit.name].trainable_bytes if training else 0 for unit in self.units)
        self.around = self._modules()
        self.called_in = tuple(
            tuple(sorted(self.index_of[name] for name in names if name in self.index_of)) for names in self.around
        )
        self.flows = tuple(self._flows())
        self.entering = tuple(self._entering()) if training else ()
        self.code = tuple(self._code()) if training else ()
        self.waiting = tuple(self._waits()) if training else ()
        self.in_chain = {unit for flow in self.flows if flow.chained for unit in (flow.source, flow.target)}
        self.in_chain |= {flow.source for flow in self.flows if flow.leaves_chain}
        self.inputs = self._inputs()
        self.kept = tuple(u.saved_bytes.scaled(u.calls) + line for u, line in zip(self.units, self.inputs, strict=True))
        self.paths = tuple(tuple(_path(inventory, a, b) for b in inventory) for a in inventory)
        self._seconds: dict[int, Seconds] = {}
        self._optimizer = self._rates(profile.optimizer_s_per_byte)
        self._sums = self._rates(profile.gradient_sum_s_per_byte)

    def seconds(self, rows: int) -> Seconds:
        """Seconds of all units for a number of rows."""
        found = self._seconds.get(rows)
        if found is None:
            own = self.profile.own_code
            root = self.devices[self.root]
            found = self._seconds[rows] = Seconds(
                tuple(tuple(_at(u.forward_s.get(d), rows) for u in self.units) for d in self.devices),
                tuple(
                    tuple(_at(u.backward_s.get(d), rows) if self.training else 0.0 for u in self.units)
                    for d in self.devices
                ),
                own.forward_s[root](rows) if root in own.forward_s else 0.0,
                own.backward_s[root](rows) if self.training and root in own.backward_s else 0.0,
            )
        return found

    def optimizer_s(self, device: int, trained_bytes: int) -> float:
        """Seconds of the optimizer step on a device."""
        return trained_bytes * self._optimizer[device]

    def gradient_sum_s(self, device: int, trained_bytes: int) -> float:
        """Seconds of adding the gradients of one micro-batch to those of others."""
        return trained_bytes * self._sums[device]

    def copied_bytes(self, unit: str) -> int:
        """What a replica of a unit keeps on its device: parameters, gradients and buffers."""
        return unit_need(self.graph[unit], self.training, 0.0).total_bytes

    def missing(self, unit: int, device: int) -> ProfileError:
        """The error that seconds of a unit on a device are not in the profile."""
        name, where = self.units[unit].name, self.devices[device]
        what = "backward" if where in self.units[unit].forward_s else "forward"
        known = ", ".join(self.profile.devices) or "none"
        return ProfileError(
            f"the profile has no seconds of the {what} of {name!r} on {where!r}, so the plan cannot be predicted; it "
            f"was measured on: {known}. Profile the model on the devices of this inventory"
            + (", with training." if what == "backward" else ".")
        )

    def _check(self) -> None:
        named = [unit.name for unit in self.units]
        named += [name for flow in self.profile.flows for name in (flow.source, flow.target)]
        strange = next((name for name in named if name != OWN_CODE and name not in self.graph), None)
        if strange is not None:
            raise ProfileError(
                f"the profile knows a unit {strange!r}, which this model does not have; it is of another model. "
                "Profile this one."
            )

    def _modules(self) -> tuple[tuple[str, ...], ...]:
        """The units below each module that flowing units have in common; if they share a device, it is a block."""
        names = self.graph.names
        prefixes = dict.fromkeys(_common(flow.source, flow.target) for flow in self.profile.flows)
        for entering in self.profile.entering:
            prefixes |= dict.fromkeys((entering.module, _common(entering.source, entering.module)))
        prefixes |= dict.fromkeys(code.around for code in self.profile.code)
        prefixes |= dict.fromkeys(wait.around for wait in self.profile.waiting)
        self._prefix_of = {prefix: index for index, prefix in enumerate(prefixes)}
        return tuple(tuple(name for name in names if f"{name}.".startswith(f"{prefix}.")) for prefix in prefixes)

    def _flows(self) -> list[Flow]:
        found = []
        for flow in self.profile.flows:
            source, target = self.index_of.get(flow.source, -1), self.index_of.get(flow.target, -1)
            found.append(
                Flow(
                    source,
                    target,
                    flow.size_bytes,
                    flow.chained and source >= 0 and target >= 0,
                    flow.has_gradient and self.training,
                    self._around(_common(flow.source, flow.target)),
                    self.index_of.get(flow.taken_before_by or "", -1),
                    flow.chained and source >= 0 > target,
                )
            )
        return found

    def _entering(self) -> Iterator[Entering]:
        for entering in self.profile.entering:
            source, module = entering.source, entering.module
            yield Entering(
                self._around(module),
                entering.tensor,
                self.index_of.get(source, -1),
                self.index_of.get(entering.taken_before_by or "", -1),
                entering.taken_inside,
                self._around(_common(source, module)),
                entering.size_bytes,
            )

    def _code(self) -> Iterator[Code]:
        for code in self.profile.code:
            kept = (
                (k.size_bytes, self.index_of.get(k.source, -1), tuple(self.index_of[u] for u in k.taken_by))
                for k in code.kept
            )
            around, after = self._around(code.around), self.index_of.get(code.after, -1)
            yield Code(around, after, tuple(kept), code.moment_bytes)

    def _waits(self) -> Iterator[Wait]:
        for wait in self.profile.waiting:
            first, last = sorted((self.index_of[wait.first], self.index_of[wait.last]))
            yield Wait(self._around(wait.around), self.index_of.get(wait.source, -1), first, last, wait.size_bytes)

    def _around(self, module: str) -> int:
        return self._prefix_of[module] if module else -1

    def _inputs(self) -> tuple[Line, ...]:
        """The inputs of each unit, which autograd keeps besides what a profile calls saved."""
        inputs = [Line()] * len(self.units)
        for flow in self.flows:
            if flow.target >= 0:
                inputs[flow.target] += flow.size_bytes
        return tuple(inputs)

    def _rates(self, rates: Mapping[str, float]) -> tuple[float, ...]:
        slowest = max(rates.values(), default=0.0)  # of a device that was not measured
        return tuple(rates.get(device, slowest) for device in self.devices)


def _at(curve: Curve | None, rows: int) -> float:
    return math.nan if curve is None else curve(rows)


def _common(source: str, target: str) -> str:
    """The module that holds both: the common part of their names; "" for none below the model itself."""
    parts = []
    for one, other in zip(source.split("."), target.split("."), strict=False):
        if one != other:
            break
        parts.append(one)
    return ".".join(parts)


def _path(inventory: Inventory, sender: DeviceSpec, receiver: DeviceSpec) -> Path:
    link = inventory.link(sender.name, receiver.name)
    # Emulated devices share the memory of their torch device: nothing is copied there.
    here = sender.torch_device is not None and sender.torch_device == receiver.torch_device
    latency_s = link.latency_s if link.latency_s is not None else 0.0 if here else DEFAULT_LATENCY_S
    if link.bandwidth_bytes_per_s is not None:
        return Path(latency_s, 1 / link.bandwidth_bytes_per_s)
    return Path(latency_s, 0.0 if here else 1 / DEFAULT_BYTES_PER_S)
