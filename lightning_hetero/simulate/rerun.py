"""What activation checkpointing runs again in one piece; see `lightning_hetero.runtime.layers`, which does it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.profile.costs import Line
from lightning_hetero.simulate.costs import Costs

Piece = tuple[int, int]
"""Units that run again together: the first of them, and the one behind the last, in the order of calls."""


def pieces_to_rerun(costs: Costs, device_of: Mapping[str, str], checkpointed: Collection[str]) -> tuple[Piece, ...]:
    """The pieces of a placed model, in the order of calls.

    None if the graph knows no compounds: then the model cannot run twice, or each unit would run alone, which saves
    little or nothing. Units of a piece that are called with others in between count as if they kept everything.

    Args:
        costs: Of the model.
        device_of: Device name of each unit.
        checkpointed: Units with activation checkpointing.
    """
    if not checkpointed or not costs.graph.compounds:
        return ()
    chosen = set(checkpointed)
    found = []
    for name in _outermost(costs.graph, device_of):
        below = [unit for unit in costs.graph.names if _is_below(unit, name)]
        if chosen.isdisjoint(below):
            continue
        for part in _layers_of(costs.graph, name):
            units = [index for index, unit in enumerate(costs.units) if _is_below(unit.name, part)]
            if units and units[-1] - units[0] == len(units) - 1:
                found.append((units[0], units[-1] + 1))
    return tuple(sorted(found))


def piece_of_units(costs: Costs, pieces: Sequence[Piece]) -> list[int]:
    """Index of the piece of each unit; -1 for units that keep their activations."""
    found = [-1] * len(costs.units)
    for index, (first, stop) in enumerate(pieces):
        found[first:stop] = [index] * (stop - first)
    return found


def handed_on(costs: Costs, piece_of: Sequence[int]) -> Mapping[int, Line]:
    """What each piece hands on; a gradient of the same size is there when the piece runs again."""
    found: defaultdict[int, set[tuple[int, Line]]] = defaultdict(set)
    for flow in costs.flows:
        piece = piece_of[flow.source] if flow.source >= 0 else -1
        if piece >= 0 and (flow.target < 0 or piece_of[flow.target] != piece):
            found[piece].add((flow.source, flow.size_bytes))
    return {piece: sum((size for _, size in sizes), Line()) for piece, sizes in found.items()}


def _outermost(graph: ModelGraph, device_of: Mapping[str, str]) -> Iterator[str]:
    """The largest modules that are called and lie on one device: what the runtime makes blocks of."""
    called = [compound.name for compound in graph.compounds if compound.is_called]
    names = dict.fromkeys(name for unit in graph.names for name in (*_above(unit, called), unit))
    last = None
    for name in names:
        if last is not None and _is_below(name, last):
            continue
        if len({device_of[unit] for unit in graph.names if _is_below(unit, name)}) == 1:
            last = name
            yield name


def _above(unit: str, called: Sequence[str]) -> list[str]:
    """The modules around a unit, the outermost first."""
    return sorted((name for name in called if name != unit and _is_below(unit, name)), key=len)


def _layers_of(graph: ModelGraph, block: str) -> Iterator[str]:
    layers = {compound.name for compound in graph.compounds if compound.is_layer}
    if block in layers or not any(_is_below(layer, block) for layer in layers):
        yield block
        return
    last = block
    for compound in graph.compounds:  # in order of definition, what is above comes first
        name = compound.name
        if name == block or not _is_below(name, block) or (last != block and _is_below(name, last)):
            continue
        if name in layers or not any(layer != name and _is_below(layer, name) for layer in layers):
            last = name
            if compound.is_called:
                yield name


def _is_below(name: str, above: str) -> bool:
    return f"{name}.".startswith(f"{above}.")
