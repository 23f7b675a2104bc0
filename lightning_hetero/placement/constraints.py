"""What a placement has to respect whatever its policy wants: pins, groups, forbidden and trusted devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.placement.names import check_module_name, covers, did_you_mean, listing, longest
from lightning_hetero.profile.costs import OWN_CODE

if TYPE_CHECKING:
    from lightning_hetero.placement.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Rules for every policy.

    A module's name stands for all units below it.

    Attributes:
        pins: Name of a unit or module -> device. The longest name wins.
        together: Groups of names whose units stand on one device.
        forbidden: Devices that no unit may use. The root still runs the model's own code.
        trusted: Devices that may hold the batch, labels, and units of `private` modules; None: all. The root must be
            among them, since the batch, own code and loss are there. What trusted units send on may go anywhere.
        private: Names of modules whose parameters must not leave the trusted devices.
    """

    pins: Mapping[str, str] = field(default_factory=dict)
    together: tuple[tuple[str, ...], ...] = ()
    forbidden: tuple[str, ...] = ()
    trusted: tuple[str, ...] | None = None
    private: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """Devices that one rule leaves to a unit, and the rule in words that fit after the unit's name."""

    devices: frozenset[str]
    why: str


def check_names(problem: Problem) -> None:
    """Raise if the constraints name something that does not exist, or contradict themselves.

    Raises:
        PlacementError: The message has the nearest valid name.
    """
    rules, graph = problem.constraints, problem.graph
    for key in rules.pins:
        check_module_name(key, graph, "pins")
    for group in rules.together:
        for key in group:
            check_module_name(key, graph, "together")
    for key in rules.private:
        check_module_name(key, graph, "private")
    able = [device.name for device in problem.candidates]
    asked = [(f"pins, entry {key!r}", device) for key, device in rules.pins.items()]
    asked += [("forbidden", device) for device in rules.forbidden if device not in problem.inventory]
    asked += [("trusted", device) for device in rules.trusted or () if device not in problem.inventory]
    for where, device in asked:
        if device not in problem.inventory:
            names = problem.inventory.names
            raise PlacementError(
                f"{where}: unknown device {device!r}.{did_you_mean(device, names, 1)} Devices here: {', '.join(names)}."
            )
        if device not in able:
            raise PlacementError(
                f"{where}: {device!r} cannot train, so no unit can stand there. Devices that can: {', '.join(able)}."
            )
    if rules.private and rules.trusted is None:
        raise PlacementError(
            f"private: {rules.private[0]!r} has to stay on trusted devices, but none are named. "
            f"Set trusted to some of {', '.join(able)}."
        )
    if rules.trusted is not None and able and problem.inventory.root.name not in rules.trusted:
        root = problem.inventory.root.name
        raise PlacementError(
            f"trusted: the root {root!r} is not trusted, but the batch, the labels and the loss are there. Add it to "
            "trusted, or put a trusted device first in the list of devices."
        )


def rules_for(problem: Problem) -> dict[str, list[Rule]]:
    """The rules that hold for every unit, by its name; what `together` asks is not among them."""
    constraints = problem.constraints
    every = frozenset(device.name for device in problem.candidates)
    seen = _see_the_batch(problem) if constraints.trusted is not None else {}
    found = {}
    for unit in problem.graph.units:
        rules = [
            Rule(every - {device}, f"cannot stand on {device}, which {refused[unit.name]}")
            for device, refused in problem.refused.items()
            if unit.name in refused
        ]
        if constraints.forbidden:
            rules.append(Rule(every - set(constraints.forbidden), f"must not use {', '.join(constraints.forbidden)}"))
        key = longest(constraints.pins, unit)
        if key is not None:
            rules.append(Rule(frozenset({constraints.pins[key]}), f"is pinned to {constraints.pins[key]!r}"))
        if constraints.trusted is not None:
            trusted = frozenset(constraints.trusted)
            only = f"so it needs a trusted device ({', '.join(constraints.trusted)})"
            if any(covers(name, unit) for name in constraints.private):
                rules.append(Rule(trusted, f"is private, {only}"))
            if unit.name in seen:
                rules.append(Rule(trusted, f"{seen[unit.name]}, {only}"))
        found[unit.name] = rules
    return found


def _see_the_batch(problem: Problem) -> dict[str, str]:
    """Units that are given the batch or what own code made of it, and why that is so."""
    profile = problem.profile
    if profile is None or not profile.flows:
        return dict.fromkeys(problem.graph.names, "may see the batch (what flows where is not known without a profile)")
    sees = {flow.target for flow in profile.flows if flow.source == OWN_CODE} | {*profile.sees_batch}
    called = {unit.name for unit in profile.units}
    found = {}
    for unit in problem.graph.units:
        names = {unit.name, *unit.aliases}
        if sees & names:
            found[unit.name] = "sees the batch, or what the model's own code made of it"
        elif names & {*profile.out_of_sight}:
            found[unit.name] = "may see the batch (it is called with an object that nobody can look into)"
        elif not called & names:
            found[unit.name] = "may see the batch (it was not called in the step that was recorded)"
    return found


def may_run(graph: ModelGraph, constraints: Constraints, sees_batch: Iterable[str]) -> Callable[[str, str], bool]:
    """Whether what a unit holds and is given may be on a device, by the names of both, whatever it is there for.

    Unlike `rules_for`, which says where units may stand, that leaves pins aside: they protect no data.

    Args:
        graph: The units.
        constraints: The rules.
        sees_batch: Names of units that see the batch, or may see it.
    """
    forbidden = frozenset(constraints.forbidden)
    trusted = None if constraints.trusted is None else frozenset(constraints.trusted)
    sees = set(sees_batch)
    kept = {
        name
        for group in graph.groups  # units that share a parameter share what is private too
        if any(
            sees & {unit.name, *unit.aliases} or any(covers(key, unit) for key in constraints.private) for unit in group
        )
        for unit in group
        for name in (unit.name, *unit.aliases)
    }

    def may(unit: str, device: str) -> bool:
        return device not in forbidden and (trusted is None or device in trusted or unit not in kept)

    return may


def units_together(problem: Problem) -> list[list[Unit]]:
    """The units that each entry of `together` ties, in order."""
    return [
        [unit for unit in problem.graph.units if any(covers(name, unit) for name in names)]
        for names in problem.constraints.together
    ]


def check_constraints(device_of: Mapping[str, str], problem: Problem) -> None:
    """Prove that a placement respects the problem's constraints, on every unit and every flow of the profile.

    Raises:
        PlacementError: A unit stands where a rule does not let it, or a group is torn apart.
    """
    for name, rules in rules_for(problem).items():
        for rule in rules:
            if device_of[name] not in rule.devices:
                raise PlacementError(
                    f"{name!r} {rule.why}, but the placement has it on {device_of[name]!r}. "
                    "Change the placement, or loosen the constraint."
                )
    for units in units_together(problem):
        apart = [unit.name for unit in units if device_of[unit.name] != device_of[units[0].name]]
        if apart:
            first = units[0].name
            raise PlacementError(
                f"{listing([first, apart[0]])} must stand together, but the placement has them on "
                f"{device_of[first]!r} and {device_of[apart[0]]!r}."
            )
