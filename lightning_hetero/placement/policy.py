"""What a placement policy answers, and how policies are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.names import did_you_mean
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.forecast import Alternative, Execution
from lightning_hetero.plan.plan import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A policy's answer.

    Attributes:
        device_of: Device name of every unit.
        notes: The reasons, one sentence each, shown under the plan.
        shares_of: The replicas of units that stand on several devices, the owner of the parameters first.
        checkpointed: The units with activation checkpointing.
        execution: How a batch is to run; None: the best way that the problem allows, by prediction.
        proof: What is known about how good the answer is, in words.
        alternatives: What was considered and rejected, the best first.
        finalists: Other placements that a few real steps may show to be faster, the best first. Who only plans leaves
            them alone.
    """

    device_of: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
    shares_of: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)
    checkpointed: tuple[str, ...] = ()
    execution: Execution | None = None
    proof: str = ""
    alternatives: tuple[Alternative, ...] = ()
    finalists: tuple[Placement, ...] = ()


@runtime_checkable
class PlacementPolicy(Protocol):
    """Decides which unit stands on which device.

    A policy is pure: it reads the problem and answers; it moves, measures and prints nothing. It may answer
    with a placement that does not fit: `make_plan` or the check of the plan then raises with a table of need
    against limit.
    """

    @property
    def name(self) -> str:
        """The word for it in plans and messages."""

    def place(self, problem: Problem) -> Placement:
        """Choose a device for every unit of the problem.

        Raises:
            PlacementError: The policy cannot be obeyed for this model, these devices and constraints.
            InfeasiblePlanError: The policy looked for a placement that fits, and there is none.
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
        raise PlacementError(
            f"unknown placement policy {name!r}.{did_you_mean(name, _POLICIES, 1)} "
            f"Known are {', '.join(policy_names())}; a mapping of module name to device places by hand."
        )
    return _POLICIES[name]()
