"""What a placement policy is given, what it answers, and how policies are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Protocol, TypeVar, runtime_checkable

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.plan.build import build_plan, loose_need, unit_need
from lightning_hetero.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What has to be placed, and where it could go.

    Attributes:
        graph: The model.
        inventory: The devices; only its trainable ones may be used.
        training: Whether gradients and optimizer state need room.
        optimizer_factor: Bytes of optimizer state for each byte of trained parameter (Adam: 2).
    """

    graph: ModelGraph
    inventory: Inventory
    training: bool = True
    optimizer_factor: float = 2.0

    def need_bytes(self, units: Sequence[Unit]) -> int:
        """What the units keep on their device, without activations."""
        return sum(unit_need(unit, self.training, self.optimizer_factor).total_bytes for unit in units)

    @property
    def loose_bytes(self) -> int:
        """What the root device holds besides units."""
        return loose_need(self.graph, self.training, self.optimizer_factor).total_bytes

    def room_bytes(self) -> dict[str, int]:
        """Room for units on each trainable device."""
        room = {device.name: device.memory_bytes for device in self.inventory.trainable}
        room[self.inventory.root.name] -= self.loose_bytes
        return room


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A policy's answer.

    Attributes:
        device_of: Device name of every unit.
        notes: The reasons, one sentence each, shown under the plan.
    """

    device_of: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())


@runtime_checkable
class PlacementPolicy(Protocol):
    """Decides which unit stands on which device.

    A policy is pure: it reads the problem and answers; it moves, measures and prints nothing. It may answer
    with a placement that does not fit: the check of the plan then raises with a table of need against limit.
    """

    @property
    def name(self) -> str:
        """The word for it in plans and messages."""

    def place(self, problem: Problem) -> Placement:
        """Choose a device for every unit of the problem.

        Raises:
            PlacementError: The policy cannot be obeyed for this model and these devices.
        """


PolicyFactory = Callable[[], PlacementPolicy]
_Factory = TypeVar("_Factory", bound=PolicyFactory)
_POLICIES: dict[str, PolicyFactory] = {}


def register_policy(name: str) -> Callable[[_Factory], _Factory]:
    """Class decorator that makes a policy available as `placement="name"`.

    The class must be constructible without arguments. Registering a name again replaces it.

    Example:
        >>> from lightning_hetero.placement import Placement, register_policy
        >>> @register_policy("all_on_last")
        ... class AllOnLast:
        ...     name = "all_on_last"
        ...
        ...     def place(self, problem):
        ...         last = problem.inventory.trainable[-1].name
        ...         return Placement(device_of=dict.fromkeys(problem.graph.names, last))
        >>> from lightning_hetero.placement import get_policy
        >>> get_policy("all_on_last").name
        'all_on_last'
    """

    def register(factory: _Factory) -> _Factory:
        _POLICIES[name] = factory
        return factory

    return register


def policy_names() -> tuple[str, ...]:
    """The names that `get_policy` knows."""
    return tuple(sorted(_POLICIES))


def get_policy(name: str) -> PlacementPolicy:
    """A new policy of that name.

    Raises:
        PlacementError: No policy has that name; the message lists those that exist.
    """
    if name not in _POLICIES:
        near = get_close_matches(name, _POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PlacementError(
            f"unknown placement policy {name!r}.{hint} Known are {', '.join(policy_names())}; "
            "a mapping of module name to device places by hand."
        )
    return _POLICIES[name]()


def make_plan(policy: PlacementPolicy, problem: Problem) -> Plan:
    """Ask the policy and write its answer down as a plan, not yet checked.

    Raises:
        PlacementError: The policy cannot be obeyed, or left a unit without a device.
    """
    placement = policy.place(problem)
    missing = [name for name in problem.graph.names if name not in placement.device_of]
    if missing:
        raise PlacementError(
            f"policy {policy.name!r} gave no device to {missing[0]!r}"
            + (f" and {len(missing) - 1} more units" if len(missing) > 1 else "")
            + ". A policy has to place every unit of `problem.graph`."
        )
    return build_plan(
        problem.graph,
        problem.inventory,
        placement.device_of,
        policy=policy.name,
        notes=placement.notes,
        training=problem.training,
        optimizer_factor=problem.optimizer_factor,
    )
