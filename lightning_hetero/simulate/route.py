"""From devices of units to stages in the order of calls, and what moves at their borders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lightning_hetero.errors import PlacementError
from lightning_hetero.profile.costs import Line
from lightning_hetero.simulate.costs import Costs


class Move(NamedTuple):
    """A copy from one device to another, at the border of a stage.

    Attributes:
        sender: Index of the device where the tensors are.
        receiver: Index of the device that gets them.
        size_bytes: How much.
        times: In how many messages.
        comes_back: Whether as much gradient goes the other way in the backward.
        stage: The stage that cannot begin (`enters`) or end without it.
        enters: Whether it is an input of the stage.
        given: Whether it is the batch, or made by the model's own code.
        source: Index of the unit that made it; -1 for none.
    """

    sender: int
    receiver: int
    size_bytes: Line
    times: int
    comes_back: bool
    stage: int
    enters: bool
    given: bool
    source: int


class Run(NamedTuple):
    """A stage: units that follow each other in the order of calls, on one device.

    Attributes:
        device: Index of the device.
        first: Index of its first unit.
        stop: Index behind its last unit.
        calls: In how many pieces the runtime runs it.
    """

    device: int
    first: int
    stop: int
    calls: int


@dataclass(frozen=True, slots=True)
class Route:
    """A placement, seen as a micro-batch sees it.

    Attributes:
        runs: The stages.
        moves: In no particular order.
        outputs: What units on the root hand to the model's own code.
        devices: Indices of the devices that have stages, in the order of the inventory.
    """

    runs: tuple[Run, ...]
    moves: tuple[Move, ...]
    outputs: Line
    devices: tuple[int, ...]


def route(costs: Costs, device_of: Mapping[str, str]) -> Route:
    """Follow a micro-batch through the model, as the runtime moves it.

    Outputs of a module go back to the root and inputs come from there, except within a module whose units are all on
    one device, where nothing moves, and in an `nn.Sequential`, where they go straight on. A tensor that several
    modules take is sent home once and fetched by each.

    Raises:
        PlacementError: A unit has no device, or one that is not in the inventory.
    """
    where = _devices(costs, device_of)
    stage_of, borders = _cut(where)
    is_block = [len({device_of[name] for name in names}) == 1 for names in costs.around]
    root = costs.root
    moves: list[Move] = []
    homeward: dict[tuple[int, Line], bool] = {}
    alone = [False] * len(where)  # whether a unit gets its inputs from the root, as a piece of its own
    joined = [False] * len(where)
    outputs = Line()
    for source, target, size, chained, gradient, around, *_ in costs.flows:
        here = where[source] if source >= 0 else root
        there = where[target] if target >= 0 else root
        if source >= 0 and target >= 0 and ((around >= 0 and is_block[around]) or (chained and here == there)):
            joined[target] = joined[target] or stage_of[source] == stage_of[target]
            continue
        if target >= 0:
            alone[target] = True
        if chained:
            times = costs.units[target].calls
            moves.append(Move(here, there, size, times, gradient, stage_of[target], True, False, source))
            continue
        if here != root:
            homeward[source, size] = homeward.get((source, size), False) or gradient
        elif source >= 0:
            outputs += size
        if there != root:
            times = costs.units[target].calls
            moves.append(Move(root, there, size, times, gradient, stage_of[target], True, source < 0, source))
    for (source, size), gradient in homeward.items():
        times = costs.units[source].calls
        moves.append(Move(where[source], root, size, times, gradient, stage_of[source], False, False, source))
    runs = tuple(
        Run(where[first], first, stop, 1 + sum(alone[u] and not joined[u] for u in range(first + 1, stop)))
        for first, stop in borders
    )
    return Route(runs, tuple(moves), outputs, tuple(sorted(set(where))))


def trained_bytes(costs: Costs, way: Route) -> dict[int, int]:
    """Bytes of the parameters that the optimizer changes, by index of the device; none without training."""
    trained = dict.fromkeys((costs.root, *way.devices), 0)
    trained[costs.root] += costs.graph.loose_trainable_bytes if costs.training else 0
    for run in way.runs:
        trained[run.device] += sum(costs.trained_bytes[run.first : run.stop])
    return trained


def _devices(costs: Costs, device_of: Mapping[str, str]) -> list[int]:
    """Index of the device of each unit that is called."""
    index = {name: at for at, name in enumerate(costs.devices)}
    try:
        where = [index[device_of[name]] for name in costs.graph.names]
    except KeyError as error:
        unit = next(name for name in costs.graph.names if device_of.get(name) not in index)
        found = (
            f"stands on {device_of[unit]!r}, which is not in the inventory" if unit in device_of else "has no device"
        )
        raise PlacementError(
            f"{unit!r} {found}. Give every unit one of the devices {', '.join(costs.devices)}."
        ) from error
    by_name = dict(zip(costs.graph.names, where, strict=True))
    return [by_name[costs.graph[unit.name].name] for unit in costs.units]


def _cut(where: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The stage of each unit, and the first unit and the one behind the last of each stage."""
    stage_of: list[int] = []
    borders: list[tuple[int, int]] = []
    for unit, device in enumerate(where):
        if unit and where[unit - 1] == device:
            borders[-1] = (borders[-1][0], unit + 1)
        else:
            borders.append((unit, unit + 1))
        stage_of.append(len(borders) - 1)
    return stage_of, borders
