"""The policy `auto`: the best plan of all policies, if it clearly beats the best single device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_hetero.placement import dag, exact, heft, interleaved, proportional
from lightning_hetero.placement.even import EvenPolicy
from lightning_hetero.placement.explain_choice import explain_choice
from lightning_hetero.placement.found import Found, best_of
from lightning_hetero.placement.improve import improve
from lightning_hetero.placement.judge import Judge
from lightning_hetero.placement.memory_first import MemoryFirstPolicy, fill
from lightning_hetero.placement.pieces import device_map, pieces_of
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import infeasible

LEAST_GAIN = 0.03
LEADERS, TRIES = 3, 60


@register_policy("auto")
@dataclass(frozen=True)
class AutoPolicy:
    """Never predicted to be slower than the best single device, and fits where no single device does.

    With a profile, all policies are asked, for all numbers of micro-batches and ways to run that the problem allows,
    and the best prediction is taken. A plan over several devices has to beat the best single device by `least_gain`:
    predictions err by several percent, mostly to the bright side, so a smaller gain may be none. Without a profile
    sizes alone must not spread a model, so it stays on the first device that holds it, and is spread by memory
    otherwise.

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
        singles = judge.singles()
        asked = dict(_searches(judge))
        # A good plan of one kind may have a better neighbour than the best plan of another kind has.
        leaders = sorted(asked, key=lambda name: asked[name].best.key)[:LEADERS]
        improved = {name: improve(judge, asked[name].best, tries=TRIES) for name in leaders}
        winner = min(improved, key=lambda name: improved[name].key)
        best = improved[winner]
        home = best_of(singles.values()) if singles else None
        if home is not None and home.fits and not (best.fits and best.value < home.value * (1 - self.least_gain)):
            best, winner = home, "single"
        if not best.fits:
            raise infeasible(problem, best.forecast, best.execution, self.name)
        notes, alternatives = explain_choice(judge, best, winner, singles, asked, self.least_gain)
        return Placement(
            device_of=device_map(judge.pieces, best.homes),
            notes=notes,
            execution=best.execution,
            proof=asked[winner].proof if winner in asked else "",
            alternatives=alternatives,
        )


def _searches(judge: Judge) -> Iterator[tuple[str, Found]]:
    """What each policy finds, the quick ones first, in case time runs out. The first three always answer."""
    pieces = judge.pieces
    yield "even", Found(best=judge.best_execution(EvenPolicy().homes(judge.problem, pieces)))
    yield "memory_first", Found(best=judge.best_execution(fill(judge.problem, pieces)[0]))
    yield "proportional", proportional.find(judge)
    if min(len(judge.names), len(pieces)) < 2:
        return
    searches = {"interleaved": interleaved.find, "heft": heft.find, "exact": exact.find, "dag": dag.find}
    for name, find in searches.items():
        if judge.problem.time_is_up():
            return
        yield name, find(judge)


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
        note = "The model fits on no single device, so it is spread by memory."
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
