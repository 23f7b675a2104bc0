"""The policy `manual`: a map from module names to devices, in Hugging Face's `device_map` spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.placement.auto import AutoPolicy
from lightning_hetero.placement.names import REST, check_module_name, listing, longest
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem


@register_policy("manual")
@dataclass(frozen=True)
class ManualPolicy:
    """Obey a device map.

    Args:
        device_map: Module name to device. A name covers all units below it; the longest name wins. `""` (or
            `"*"`) covers the rest. A device is a name of the inventory, a kind with one device ("cuda"), or a
            number: 1 is the accelerator with index 1. The value `"auto"` leaves these units to the policy
            `auto`, within the memory that the others leave.

    Example:
        >>> ManualPolicy({"backbone": "cuda:0", "head": "cuda:1", "": "auto"}).name
        'manual'
    """

    device_map: Mapping[str, str | int] = field(default_factory=dict)
    name: str = "manual"

    def place(self, problem: Problem) -> Placement:
        """Look every unit up."""
        graph, inventory = problem.graph, problem.inventory
        if not self.device_map:
            raise PlacementError(
                "placement 'manual' needs a device map, for example "
                'placement={"backbone": "cuda:0", "": "auto"}; names are those of `named_modules()`. '
                f"Units of this model: {listing(graph.names)}."
            )
        devices = {key: _device(value, key, inventory) for key, value in self.device_map.items()}
        for key in devices:
            check_module_name(key, graph, "device map")
        keys = {unit.name: longest(devices, unit) for unit in graph.units}
        device_of = {name: devices[key] for name, key in keys.items() if key is not None}
        _share_ties(device_of, devices, graph)
        missing = [name for name in graph.names if name not in device_of]
        if missing:
            raise PlacementError(
                f"the device map leaves out {listing(missing)}. Add them, or a default for the rest: "
                '"": "auto" (or a device).'
            )
        rest = [unit for unit in graph.units if device_of[unit.name] == "auto"]
        notes = [f"{len(graph.units) - len(rest)} of {len(graph.units)} units are placed by hand."]
        if rest:
            answer = AutoPolicy().place(_pinned(problem, device_of))
            device_of |= {unit.name: answer.device_of[unit.name] for unit in rest}
            notes.append(f"The rest: {' '.join(answer.notes)}")
            return replace(answer, device_of=device_of, notes=tuple(notes))
        return Placement(device_of=device_of, notes=tuple(notes))


def _device(value: object, key: str, inventory: Inventory) -> str:
    """The inventory's name for what the user wrote."""
    where = f"device map, entry {key!r}"
    exist = f"Devices here: {', '.join(inventory.names)}."
    if isinstance(value, int) and not isinstance(value, bool):
        kinds = [d.kind for d in inventory.trainable if d.kind not in ("cpu", "emulated")]
        if not kinds:
            raise PlacementError(
                f"{where}: {value} means accelerator number {value}, and there is none. {exist} "
                'Write a name such as "cpu".'
            )
        value = f"{kinds[0]}:{value}"
    name = str(value)
    if name == "auto" or name in inventory:
        return name
    if name == "disk":
        raise PlacementError(
            f"{where}: 'disk' offload is for inference only; a unit that trains needs a device. {exist}"
        )
    of_kind = [device.name for device in inventory if device.kind == name]
    if len(of_kind) == 1:
        return of_kind[0]
    if of_kind:
        raise PlacementError(f"{where}: {name!r} could be any of {', '.join(of_kind)}; write which one.")
    raise PlacementError(f"{where}: unknown device {name!r}. {exist}")


def _share_ties(device_of: dict[str, str], devices: Mapping[str, str], graph: ModelGraph) -> None:
    """Tied units go where the one with the longest key goes; two devices for one group are an error."""
    for group in graph.groups:
        keys = {unit.name: key for unit in group if (key := longest(devices, unit)) is not None}
        named = {unit: devices[key] for unit, key in keys.items() if key not in REST}
        if len(set(named.values())) > 1:
            tied = [(u.name, named[u.name]) for u in group if u.name in named and not u.is_parameter_free]
            apart = [(n, d) for n, d in tied if d != tied[0][1]]
            if apart:
                (one, here), (other, there) = tied[0], apart[0]
                raise PlacementError(
                    f"device map: {one!r} on {here!r} and {other!r} on {there!r} share a parameter, so they must "
                    "stand on one device."
                )
        if named:
            device = next(iter(named.values()))
            device_of.update({u.name: named.get(u.name, device) for u in group})


def _pinned(problem: Problem, device_of: Mapping[str, str]) -> Problem:
    """The problem with everything pinned that is placed by hand."""
    pins = dict(problem.constraints.pins)
    for group in problem.graph.groups:
        by_hand = [unit.name for unit in group if device_of[unit.name] != "auto"]
        # A group moves as one, so its first unit stands for it; units without parameters may still be placed apart.
        pins |= {unit.name: device_of[by_hand[0]] for unit in group if by_hand}
    return replace(problem, constraints=replace(problem.constraints, pins=pins))
