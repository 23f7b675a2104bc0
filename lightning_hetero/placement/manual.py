"""The policy `manual`: a map from module names to devices, in Hugging Face's `device_map` spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.placement.auto import AutoPolicy
from lightning_hetero.placement.names import REST, check_module_name, listing, longest
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.replicas import read_shares
from lightning_hetero.plan.plan import Share


@register_policy("manual")
@dataclass(frozen=True)
class ManualPolicy:
    """Obey a device map.

    Args:
        device_map: Module name to device. A name covers all units below it; the longest name wins. `""` (or
            `"*"`) covers the rest. A device is a name of the inventory, a kind with one device ("cuda"), or a
            number: 1 is the accelerator with index 1. The value `"auto"` leaves these units to the policy
            `auto`, within the memory that the others leave. A mapping of device to share puts replicas on several
            devices, which share the rows of a batch: `{"cuda:0": 3, "cuda:1": 1}`; the first owns the parameters.

    Example:
        >>> ManualPolicy({"backbone": "cuda:0", "head": "cuda:1", "": "auto"}).name
        'manual'
    """

    device_map: Mapping[str, str | int | Mapping[str, float]] = field(default_factory=dict)
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
        devices, shares = _read(self.device_map, inventory)
        for key in devices:
            check_module_name(key, graph, "device map")
        keys = {unit.name: longest(devices, unit) for unit in graph.units}
        _share_ties(keys, devices, graph)
        device_of = {name: devices[key] for name, key in keys.items() if key is not None}
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
            by_hand = {name: device for name, device in device_of.items() if name not in {unit.name for unit in rest}}
            finalists = tuple(
                replace(finalist, device_of={**finalist.device_of, **by_hand}) for finalist in answer.finalists
            )
            answer = replace(answer, device_of=device_of, notes=tuple(notes), finalists=finalists)
        else:
            answer = Placement(device_of=device_of, notes=tuple(notes))
        shares_of = {name: shares[key] for name, key in keys.items() if key in shares}
        if not shares_of:
            return answer
        device_of = dict(answer.device_of) | {name: of[0].device for name, of in shares_of.items()}
        # What `auto` says of times, and of other ways to run, is about a plan without replicas.
        return Placement(device_of=device_of, notes=answer.notes, shares_of=shares_of)


def _read(
    device_map: Mapping[str, str | int | Mapping[str, float]], inventory: Inventory
) -> tuple[dict[str, str], dict[str, tuple[Share, ...]]]:
    """The device of each entry, and the replicas of those that have more than one."""
    devices: dict[str, str] = {}
    shares: dict[str, tuple[Share, ...]] = {}
    for key, value in device_map.items():
        if isinstance(value, Mapping):
            found = read_shares(value, f"device map, entry {key!r}", partial(_device, key=key, inventory=inventory))
            devices[key] = found[0].device
            if len(found) > 1:
                shares[key] = found
        else:
            devices[key] = _device(value, key, inventory)
    return devices, shares


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


def _share_ties(keys: dict[str, str | None], devices: Mapping[str, str], graph: ModelGraph) -> None:
    """Tied units without an entry of their own get that of the group; two devices for one group are an error."""
    for group in graph.groups:
        own = {unit.name: key for unit in group if (key := keys[unit.name]) is not None and key not in REST}
        named = {unit: devices[key] for unit, key in own.items()}
        if len(set(named.values())) > 1:
            tied = [(u.name, named[u.name]) for u in group if u.name in named and not u.is_parameter_free]
            apart = [(n, d) for n, d in tied if d != tied[0][1]]
            if apart:
                (one, here), (other, there) = tied[0], apart[0]
                raise PlacementError(
                    f"device map: {one!r} on {here!r} and {other!r} on {there!r} share a parameter, so they must "
                    "stand on one device."
                )
        if own:
            first = next(iter(own.values()))
            keys.update({unit.name: own.get(unit.name, first) for unit in group})


def _pinned(problem: Problem, device_of: Mapping[str, str]) -> Problem:
    """The problem with everything pinned that is placed by hand."""
    pins = dict(problem.constraints.pins)
    for group in problem.graph.groups:
        by_hand = [unit.name for unit in group if device_of[unit.name] != "auto"]
        # A group moves as one, so its first unit stands for it; units without parameters may still be placed apart.
        pins |= {unit.name: device_of[by_hand[0]] for unit in group if by_hand}
    return replace(problem, constraints=replace(problem.constraints, pins=pins))
