"""The policy `memory_first`: fill the devices in order, each up to its limit."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.placement.pieces import Piece, device_map, pieces_of
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.units import format_bytes


@register_policy("memory_first")
@dataclass(frozen=True)
class MemoryFirstPolicy:
    """Fill the first device with consecutive units until the next one does not fit, then go on with the second.

    If that leaves units over, they go wherever room is left (first fit), at the price of more borders. If they
    fit nowhere, they are put on the device with most room, and the check of the plan says what is missing.
    Units that constraints keep from some devices are placed before all others.
    """

    name: str = "memory_first"

    def place(self, problem: Problem) -> Placement:
        """Fill the devices."""
        pieces = pieces_of(problem)
        homes, left_over = fill(problem, pieces)
        notes = ["Devices are filled in order, each up to its memory limit."]
        if not left_over and _in_order(problem, pieces, back=False)[1]:
            notes.append("Some units fill gaps on earlier devices, since they do not fit in order.")
        notes += [
            f"{piece.name} needs {format_bytes(piece.need_bytes)} and fits on no device." for piece in left_over[:1]
        ]
        return Placement(device_of=device_map(pieces, homes), notes=tuple(notes))


def fill(problem: Problem, pieces: tuple[Piece, ...]) -> tuple[tuple[str, ...], list[Piece]]:
    """The device of every piece, and the pieces for which there was no room."""
    homes, left_over = _in_order(problem, pieces, back=False)
    return _in_order(problem, pieces, back=True) if left_over else (homes, left_over)


def _in_order(problem: Problem, pieces: tuple[Piece, ...], *, back: bool) -> tuple[tuple[str, ...], list[Piece]]:
    """Place each piece on the current device or a later one, or on any device if `back`.

    Returns:
        The device of every piece, and the pieces that were too large for the room that was left.
    """
    room = problem.room_bytes()
    names = list(room)
    homes: dict[int, str] = {}
    left_over = []
    bound = [spot for spot, piece in enumerate(pieces) if len(piece.devices) < len(names)]
    free = [spot for spot, piece in enumerate(pieces) if len(piece.devices) == len(names)]
    current = 0
    for spot in (*sorted(bound, key=lambda spot: len(pieces[spot].devices)), *free):
        piece = pieces[spot]
        is_free = len(piece.devices) == len(names)
        candidates = names[current:] if is_free and not back else piece.devices
        chosen = next((name for name in candidates if piece.need_bytes <= room[name]), None)
        if chosen is None:
            left_over.append(piece)
            chosen = max(piece.devices, key=room.__getitem__)
        elif is_free:
            current = max(current, names.index(chosen))
        room[chosen] -= piece.need_bytes
        homes[spot] = chosen
    return tuple(homes[spot] for spot in range(len(pieces))), left_over
