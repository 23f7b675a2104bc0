"""The policy `manual`: a map from module names to devices, in Hugging Face's `device_map` spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.placement.auto import AutoPolicy
from lightning_hetero.placement.policy import Placement, Problem, register_policy

_REST = ("", "*")


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
                f"Units of this model: {_listing(graph.names)}."
            )
        devices = {key: _device(value, key, inventory) for key, value in self.device_map.items()}
        _check_keys(devices, graph)
        device_of = {unit.name: devices[key] for unit in graph.units if (key := _key(unit, devices)) is not None}
        _share_ties(device_of, devices, graph)
        missing = [name for name in graph.names if name not in device_of]
        if missing:
            raise PlacementError(
                f"the device map leaves out {_listing(missing)}. Add them, or a default for the rest: "
                '"": "auto" (or a device).'
            )
        rest = [unit for unit in graph.units if device_of[unit.name] == "auto"]
        notes = [f"{len(graph.units) - len(rest)} of {len(graph.units)} units are placed by hand."]
        if rest:
            answer = AutoPolicy().place(_without(problem, device_of, rest))
            device_of.update(answer.device_of)
            notes.append(f"The rest: {' '.join(answer.notes)}")
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


def _covers(key: str, unit: Unit) -> bool:
    return key in _REST or any(name == key or name.startswith(f"{key}.") for name in (unit.name, *unit.aliases))


def _key(unit: Unit, devices: Mapping[str, str]) -> str | None:
    """The longest key that covers the unit."""
    return max((key for key in devices if _covers(key, unit)), key=lambda k: len(k.strip("*")), default=None)


def _check_keys(devices: Mapping[str, str], graph: ModelGraph) -> None:
    for key in devices:
        if key in _REST or any(_covers(key, unit) for unit in graph.units):
            continue
        inside = next((n for n in graph.names if key.startswith(f"{n}.")), None)
        if inside is not None:
            why = dict(graph.whole).get(inside, "it is one unit")
            raise PlacementError(
                f"device map: {key!r} lies inside {inside!r}, which stays whole because {why}. "
                f"Place {inside!r} instead."
            )
        names = sorted({".".join(n.split(".")[: i + 1]) for n in graph.names for i in range(n.count(".") + 1)})
        near = get_close_matches(key, names, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise PlacementError(
            f"device map: no unit is named {key!r} or lies below it.{hint} "
            f"Units of this model: {_listing(graph.names)}."
        )


def _share_ties(device_of: dict[str, str], devices: Mapping[str, str], graph: ModelGraph) -> None:
    """Tied units go where the one with the longest key goes; two devices for one group are an error."""
    for group in graph.groups:
        keys = {unit.name: key for unit in group if (key := _key(unit, devices)) is not None}
        named = {unit: devices[key] for unit, key in keys.items() if key not in _REST}
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


def _without(problem: Problem, device_of: Mapping[str, str], rest: list[Unit]) -> Problem:
    """The problem that is left when everything else has taken its room."""
    taken: dict[str, int] = {}
    for unit in problem.graph.units:
        device = device_of[unit.name]
        taken[device] = taken.get(device, 0) + problem.need_bytes([unit])
    devices = tuple(
        replace(device, memory_bytes=max(1, device.memory_bytes - taken.get(device.name, 0)))
        for device in problem.inventory
    )
    return replace(
        problem,
        graph=replace(problem.graph, units=tuple(rest)),
        inventory=replace(problem.inventory, devices=devices),
    )


def _listing(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(map(repr, names[:6]))
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
