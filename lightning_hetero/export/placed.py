"""Which device each unit of a module is for: by a plan, by a device map, or by where its parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from torch import nn

from lightning_hetero.errors import PlacementError
from lightning_hetero.export.cut import UnitOf
from lightning_hetero.graph.find import find_units
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.placement.names import check_module_name, listing, longest
from lightning_hetero.plan.plan import Plan


def device_names(module: nn.Module, placement: Plan | Mapping[str, str] | None) -> tuple[UnitOf, dict[str, str], str]:
    """Where the units are to be.

    Returns:
        The unit that a module belongs to; the device of each unit; the device of what is in no unit.

    Raises:
        PlacementError: The plan is of another model, or the map names modules that do not exist, or leaves some out.
    """
    if isinstance(placement, Plan):
        known = dict(module.named_modules())
        graph = find_units(module, [name for name in placement.device_of if name in known])  # some were kept whole
        return unit_finder(graph), _of_plan(graph, placement, type(module).__name__), placement.root.name
    graph = find_units(module)
    if placement is not None:
        device_of = _of_map(graph, placement)
    else:
        device_of = {unit.name: _place(module.get_submodule(unit.name)) for unit in graph.units}
    return unit_finder(graph), device_of, next(iter(device_of.values()), "cpu")


def unit_finder(graph: ModelGraph) -> UnitOf:
    """Finds the unit around a module."""
    names = {name: unit.name for unit in graph.units for name in (unit.name, *unit.aliases)}

    def unit_of(path: str) -> str | None:
        while path:
            if path in names:
                return names[path]
            path = path.rpartition(".")[0]
        return None

    return unit_of


def _of_plan(graph: ModelGraph, plan: Plan, model: str) -> dict[str, str]:
    device_of = plan.device_of
    if {*device_of} != {*graph.names}:
        odd = sorted({*device_of} ^ {*graph.names})
        raise PlacementError(
            f"the plan is not one for {model}: they differ in {listing(odd)}. "
            "Give the plan that was made for this model, or a device map."
        )
    return device_of


def _of_map(graph: ModelGraph, device_map: Mapping[str, str]) -> dict[str, str]:
    for key in device_map:
        check_module_name(key, graph, "placement")
    keys = {unit.name: longest(device_map, unit) for unit in graph.units}
    missing = [name for name, key in keys.items() if key is None]
    if missing:
        raise PlacementError(f"placement leaves out {listing(missing)}. Add them, or a device for the rest: '': 'cpu'.")
    return {name: device_map[key] for name, key in keys.items() if key is not None}


def _place(unit: nn.Module) -> str:
    return str(next(chain(unit.parameters(), unit.buffers())).device)
