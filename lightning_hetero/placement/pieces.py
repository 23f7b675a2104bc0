"""What a policy can move: units that must stand together, with the devices that constraints leave to them."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import Unit
from lightning_hetero.placement.constraints import Rule, rules_for, units_together
from lightning_hetero.placement.names import listing
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.plan import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Units that share a device.

    Attributes:
        units: In order of definition.
        devices: Names of the devices on which it may stand, in the order of the inventory.
        need_bytes: What it keeps there, without activations.
    """

    units: tuple[Unit, ...]
    devices: tuple[str, ...]
    need_bytes: int

    @property
    def name(self) -> str:
        """That of its first unit."""
        return self.units[0].name


def pieces_of(problem: Problem) -> tuple[Piece, ...]:
    """All units of the problem, cut as finely as ties and constraints allow.

    Pieces come in the order of their first call if a profile knows it, and of definition otherwise.

    Raises:
        PlacementError: Constraints leave no device to some piece.
    """
    rules = rules_for(problem)
    groups = _merged(problem)
    order = {unit.name: place for place, unit in enumerate(problem.profile.units)} if problem.profile else {}
    if order:
        # A group that is never called stays behind the one before which it was defined.
        places, last = [], -1
        for group in groups:
            last = min((order[unit.name] for unit in group if unit.name in order), default=last)
            places.append(last)
        groups = [group for _, group in sorted(zip(places, groups, strict=True), key=lambda pair: pair[0])]
    return tuple(_piece(problem, group, rules) for group in groups)


def device_map(pieces: tuple[Piece, ...], homes: tuple[str, ...]) -> dict[str, str]:
    """Device name of every unit, from one name for each piece."""
    return {unit.name: home for piece, home in zip(pieces, homes, strict=True) for unit in piece.units}


def share_map(pieces: tuple[Piece, ...], shares: tuple[tuple[Share, ...], ...]) -> dict[str, tuple[Share, ...]]:
    """The replicas of every unit that has some, from those of each piece; no piece has any if none are given."""
    if not shares:
        return {}
    return {unit.name: of for piece, of in zip(pieces, shares, strict=True) if of for unit in piece.units}


def _merged(problem: Problem) -> list[list[Unit]]:
    """The groups of the graph, those joined that constraints tie."""
    groups = [list(group) for group in problem.graph.groups]
    for tied in units_together(problem):
        names = {unit.name for unit in tied}
        hit = [group for group in groups if any(unit.name in names for unit in group)]
        if len(hit) > 1:
            spot = groups.index(hit[0])
            groups = [group for group in groups if group not in hit]
            groups.insert(spot, [unit for group in hit for unit in group])
    return groups


def _piece(problem: Problem, group: list[Unit], rules: dict[str, list[Rule]]) -> Piece:
    usable = [device.name for device in problem.usable]
    allowed = [name for name in usable if all(name in rule.devices for unit in group for rule in rules[unit.name])]
    if not allowed:
        reasons = dict.fromkeys(f"{unit.name!r} {rule.why}" for unit in group for rule in rules[unit.name])
        together = f"{listing(unit.name for unit in group)} stand together, and " if len(group) > 1 else ""
        raise PlacementError(
            f"no device is left for {group[0].name!r}: {together}{'; '.join(reasons)}. Devices that units may use: "
            f"{', '.join(usable)}. Loosen one of these constraints."
        )
    return Piece(units=tuple(group), devices=tuple(allowed), need_bytes=problem.need_bytes(group))
