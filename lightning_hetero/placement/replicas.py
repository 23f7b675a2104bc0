"""Replicas in placements: units that stand on several devices, which share the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution
from lightning_hetero.plan.plan import Share

SharesOf = Mapping[str, tuple[Share, ...]]


def read_shares(value: Mapping[str, float], where: str, resolve: Callable[[object], str]) -> tuple[Share, ...]:
    """What a user means by `{"cuda:0": 3, "cuda:1": 1}`; the first device owns the parameters.

    Args:
        value: Device to how much of a batch it gets, in proportion to the others.
        where: For messages.
        resolve: Gives the inventory's name for a device.

    Raises:
        PlacementError: There is no device, one appears twice, or one gets nothing.
    """
    if not value:
        raise PlacementError(f'{where}: replicas need at least one device, such as {{"cuda:0": 3, "cuda:1": 1}}.')
    shares = []
    for device, share in value.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < inf:
            raise PlacementError(
                f"{where}: the share of {device!r} has to be a number above 0, got {share!r}. It says how much of a "
                'batch the device gets in proportion to the others, as in {"cuda:0": 3, "cuda:1": 1}.'
            )
        shares.append(Share(device=resolve(device), share=float(share)))
    names = [share.device for share in shares]
    if "auto" in names or len(set(names)) < len(names):
        raise PlacementError(f"{where}: replicas have to be on different devices, written by name; got {names}.")
    return tuple(shares)


def share_of_rows(graph: ModelGraph, shares_of: SharesOf) -> tuple[Share, ...] | None:
    """The shares, if the whole model has the same replicas; None otherwise."""
    found = {shares_of.get(name, ()) for name in graph.names}
    return found.pop() if len(found) == 1 else None


def can_share(problem: Problem, devices: int) -> bool:
    """Whether a batch may run so that each of so many replicas gets at least one micro-batch."""
    if problem.coupled:
        return False
    return FORWARD in problem.schedules and (problem.micro_batches is None or problem.micro_batches >= devices)


def replicated_execution(problem: Problem, shares_of: SharesOf) -> Execution:
    """How a batch runs if units have replicas and nobody says how: in micro-batches, at least one for each replica.

    If the whole model has the same replicas, micro-batches are as large as their shares, one for each; else all have
    the same size, and each replica gets as many of them as its share says.
    """
    pure = share_of_rows(problem.graph, shares_of)
    most = max((len(shares) for shares in shares_of.values()), default=1)
    count = problem.micro_batches or (most if pure else 2 * most)
    schedules = [schedule for schedule in problem.schedules if schedule != WHOLE] or [FORWARD]
    schedule = FORWARD if FORWARD in schedules else schedules[0]
    return Execution(
        micro_batches=count,
        schedule=schedule,
        rematerialize=schedule == FORWARD and bool(problem.rematerialize),
        weights=tuple(share.share for share in pure) * (count // most) if pure and count % most == 0 else (),
    )


def places_of(device_of: Mapping[str, str], shares_of: SharesOf) -> list[dict[str, str]]:
    """The placements that a check has to look at: that of the owners, and one for each further replica."""
    most = max((len(shares) for shares in shares_of.values()), default=1)
    return [
        dict(device_of) | {unit: shares[index].device for unit, shares in shares_of.items() if index < len(shares)}
        for index in range(most)
    ]
