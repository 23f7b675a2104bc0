"""What a search found, and how it becomes a policy's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lightning_hetero.placement.checkpointing import checkpointed
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.memory_first import fill
from lightning_hetero.placement.pieces import device_map, share_map
from lightning_hetero.placement.policy import Placement
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import in_words, infeasible

ESTIMATED = "Nothing was measured: seconds are estimates from the sizes of parameters and the speeds of devices."


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best placement of a search.

    Attributes:
        best: The placement; it may not fit.
        proof: What is known about how good it is.
    """

    best: Priced
    proof: str = ""


Search = Callable[[Judge], Found]


def place_by(search: Search, problem: Problem, name: str, note: str) -> Placement:
    """Search and answer.

    Args:
        search: What looks for the placement.
        problem: What has to be placed.
        name: The policy's.
        note: What the policy did, in one sentence.

    Raises:
        PlacementError: Constraints leave no device to some unit.
        InfeasiblePlanError: By the profile, nothing was found that fits.
    """
    judge = Judge(problem)
    if not judge.pieces:
        return Placement(device_of={}, notes=(note,))
    found = search(judge)
    if not found.best.fits:
        filled = judge.best_execution(fill(problem, judge.pieces)[0])
        found = Found(best=best_of((found.best, filled, *judge.singles().values())))
    best, why = found.best, ""
    if not best.fits and (rescue := checkpointed(judge)) is not None:
        best, why = rescue
        found = Found(best=best)
    if not best.fits and problem.profile is not None:  # an estimate is not enough to refuse; `check_plan` will see
        raise infeasible(problem, best.forecast, best.execution, name)
    notes = [note, f"A batch runs {_how(best)} on {', '.join(n for n in judge.names if n in best.devices)}."]
    if why:
        notes.append(why)
    if problem.profile is None:
        notes.append(ESTIMATED)
    notes += judge.stopped_note()
    return replace(as_placement(judge, best), notes=tuple(notes), proof=found.proof)


def as_placement(judge: Judge, priced: Priced) -> Placement:
    """What was priced, as a policy's answer."""
    device_of = device_map(judge.pieces, priced.homes)
    return Placement(
        device_of=device_of,
        shares_of=share_map(judge.pieces, priced.shares),
        checkpointed=tuple(unit for unit, device in device_of.items() if device in priced.checkpointed),
        execution=priced.execution,
    )


def best_of(priced: Iterable[Priced]) -> Priced:
    """The best of some placements, at least one."""
    return min(priced, key=lambda one: one.key)


def _how(best: Priced) -> str:
    words = in_words(best.execution)
    return "in one piece" if words == "whole" else f"in {words}"
