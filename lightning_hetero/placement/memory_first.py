"""The policy `memory_first`: fill the devices in order, each up to its limit."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.graph.model import Unit
from lightning_hetero.placement.policy import Placement, Problem, register_policy
from lightning_hetero.units import format_bytes


@register_policy("memory_first")
@dataclass(frozen=True)
class MemoryFirstPolicy:
    """Fill the first device with consecutive units until the next one does not fit, then go on with the second.

    If that leaves units over, they go wherever room is left (first fit), at the price of more borders. If they
    fit nowhere, they are put on the device with most room, and the check of the plan says what is missing.
    """

    name: str = "memory_first"

    def place(self, problem: Problem) -> Placement:
        """Fill the devices."""
        in_order = _fill(problem, back=False)
        device_of, left_over = in_order if not in_order[1] else _fill(problem, back=True)
        notes = ["Devices are filled in order, each up to its memory limit."]
        if in_order[1] and not left_over:
            notes.append("Some units fill gaps on earlier devices, since they do not fit in order.")
        notes += [
            f"{group[0].name} needs {format_bytes(problem.need_bytes(group))} and fits on no device."
            for group in left_over[:1]
        ]
        return Placement(device_of=device_of, notes=tuple(notes))


def _fill(problem: Problem, *, back: bool) -> tuple[dict[str, str], list[tuple[Unit, ...]]]:
    """Place each group on the current device or a later one, or on any device if `back`.

    Returns:
        The device of every unit, and the groups that were too large for the room that was left.
    """
    room = problem.room_bytes()
    names = list(room)
    current = 0
    device_of: dict[str, str] = {}
    left_over = []
    for group in problem.graph.groups:
        need = problem.need_bytes(group)
        candidates = names if back else names[current:]
        chosen = next((name for name in candidates if need <= room[name]), None)
        if chosen is None:
            left_over.append(group)
            chosen = max(names, key=room.__getitem__)
        else:
            current = max(current, names.index(chosen))
        room[chosen] -= need
        device_of.update({unit.name: chosen for unit in group})
    return device_of, left_over
