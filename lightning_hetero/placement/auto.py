"""The policy `auto`: the best plan of all policies, if it clearly beats the best single device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_hetero.placement.checkpointing import checkpointed
from lightning_hetero.placement.compare import compare, is_hopeful
from lightning_hetero.placement.constraint_costs import constraint_costs
from lightning_hetero.placement.explain_choice import explain_choice
from lightning_hetero.placement.found import as_placement
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.memory_first import MemoryFirstPolicy
from lightning_hetero.placement.names import listing
from lightning_hetero.placement.pieces import device_map, pieces_of
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import infeasible
from lightning_hetero.plan.forecast import FORWARD

LEAST_GAIN = 0.03
CLOSE = 0.05
"""A plan over several devices that is predicted to take so much longer than the best single one may still be faster."""


@register_policy("auto")
@dataclass(frozen=True)
class AutoPolicy:
    """Never predicted to be slower than the best single device, and fits where no single device does.

    With a profile, all policies are asked, for all numbers of micro-batches and ways to run that the problem allows,
    and the best prediction is taken. A plan over several devices has to beat the best single device by `least_gain`:
    predictions err by several percent, mostly to the bright side, so a smaller gain may be none. What comes second, of
    the best single device and the best plan over several, is a finalist if it comes near: the strategy tries both with
    real steps. Without a profile sizes alone must not spread a model, so it stays on the first device that holds it,
    and is spread by memory otherwise.

    Args:
        least_gain: Part of the best single device's time (or other objective) that a spread plan has to save.
    """

    least_gain: float = LEAST_GAIN
    name: str = "auto"

    def place(self, problem: Problem) -> Placement:
        """Choose between one device and several."""
        if problem.profile is None:
            return _unmeasured(problem)
        judge = Judge(problem)
        if not judge.pieces:
            return Placement(device_of={}, notes=("The model has no units.",))
        found = compare(judge)
        best, winner, home = found.best, found.winner, found.home
        if home is not None and home.fits and not (best.fits and best.value < home.value * (1 - self.least_gain)):
            best, winner = home, "single"
        why: tuple[str, ...] = ()
        if not best.fits and (rescue := checkpointed(judge)) is not None:
            best, why = rescue[0], rescue[1:]
        if not best.fits:
            raise infeasible(problem, best.forecast, best.execution, self.name)
        notes, alternatives = explain_choice(judge, best, winner, found.singles, found.asked, self.least_gain)
        rules = () if why else constraint_costs(judge, best)  # these would be compared with what keeps everything
        return replace(
            as_placement(judge, best),
            notes=(*notes, *why, *_coupled(problem), *rules, *judge.stopped_note()),
            proof=found.asked[winner].proof if winner in found.asked and not why else "",
            alternatives=alternatives,
            finalists=tuple(as_placement(judge, rival) for rival in _rivals(judge, best, home) if not why),
        )


def _coupled(problem: Problem) -> Iterator[str]:
    """Why batches were not cut, if rows depend on each other."""
    if problem.coupled and FORWARD in problem.schedules:
        use = "uses" if len(problem.coupled) == 1 else "use"
        yield (
            f"Batches are not cut: {listing(problem.coupled)} {use} the mean and variance of the whole batch. "
            "batch_norm='defer' takes those of micro-batches."
        )


def _rivals(judge: Judge, best: Priced, home: Priced | None) -> list[Priced]:
    """The best single device against a plan over several, and the other way round: where the prediction may err."""
    if home is not None and home != best:
        return [home] if is_hopeful(home, best) else []
    spread = [priced for priced in judge.priced() if len(priced.devices) > 1 and priced.fits]
    rival = min(spread, key=lambda priced: priced.key, default=None)
    return [rival] if rival is not None and rival.value < (1 + CLOSE) * best.value else []


def _unmeasured(problem: Problem) -> Placement:
    """One device for all that constraints leave free, if it has room; else as much as fits on each."""
    pieces, room = pieces_of(problem), problem.room_bytes()
    bound = {spot: piece.devices[0] for spot, piece in enumerate(pieces) if len(piece.devices) == 1 < len(room)}
    for spot, name in bound.items():
        room[name] -= pieces[spot].need_bytes
    free = [piece for spot, piece in enumerate(pieces) if spot not in bound]
    need = sum(piece.need_bytes for piece in free)
    able = [name for name in room if all(name in piece.devices for piece in free) and need <= room[name]]
    if not able or min(room.values()) < 0:
        spread = MemoryFirstPolicy().place(problem)
        allowed = "" if all(len(piece.devices) == len(room) for piece in pieces) else " that the constraints allow"
        note = f"The model fits on no single device{allowed}, so it is spread by memory."
        return Placement(device_of=spread.device_of, notes=(note, *spread.notes))
    homes = tuple(bound.get(spot, able[0]) for spot in range(len(pieces)))
    if bound:
        notes = [f"Constraints place {len(bound)} of {len(pieces)} pieces; the others fit on {able[0]}."]
    else:
        notes = [f"The model fits on {able[0]}, so it stays there."]
    idle = [device.name for device in problem.inventory.trainable if device.name not in homes and pieces]
    if idle:
        notes.append(
            f"{', '.join(idle)} {'stays' if len(idle) == 1 else 'stay'} idle: stages run one after the other, "
            "so using more devices would only add transfers."
        )
    return Placement(device_of=device_map(pieces, homes), notes=tuple(notes))
