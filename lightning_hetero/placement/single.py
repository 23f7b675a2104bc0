"""The policy `single`: everything on one device."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement.judge import Judge
from lightning_hetero.placement.pieces import Piece, pieces_of
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem


@register_policy("single")
@dataclass(frozen=True)
class SinglePolicy:
    """Put the whole model on one device.

    Args:
        device: Its name. None takes, of the devices on which the model fits, the fastest one by the profile, or the
            first in the order of the inventory if there is no profile; and the one with most room if there is none.
    """

    device: str | None = None
    name: str = "single"

    def place(self, problem: Problem) -> Placement:
        """Choose the device."""
        device = self.device or self._choose(problem)
        problem.inventory[device]  # raises with the list of devices if there is no such name
        return Placement(device_of=dict.fromkeys(problem.graph.names, device), notes=(f"All units stand on {device}.",))

    def _choose(self, problem: Problem) -> str:
        pieces = pieces_of(problem)
        able = devices_for_all(problem, pieces)
        if not able:
            bound = min(pieces, key=lambda piece: len(piece.devices))
            raise PlacementError(
                f"placement 'single' puts all units on one device, but constraints leave none for all of them: "
                f"{bound.name!r} may stand on {', '.join(bound.devices)} only. Loosen a constraint, or use "
                "placement='auto'."
            )
        if problem.profile is not None and pieces:
            return min(Judge(problem).singles().values(), key=lambda priced: priced.key).homes[0]
        room = problem.room_bytes()
        return first_fit(problem, pieces) or max(able, key=room.__getitem__)


def devices_for_all(problem: Problem, pieces: tuple[Piece, ...]) -> list[str]:
    """Devices on which every piece may stand."""
    return [device.name for device in problem.usable if all(device.name in piece.devices for piece in pieces)]


def first_fit(problem: Problem, pieces: tuple[Piece, ...]) -> str | None:
    """The first device that may hold all pieces and has room for them, or None."""
    need, room = sum(piece.need_bytes for piece in pieces), problem.room_bytes()
    return next((name for name in devices_for_all(problem, pieces) if need <= room[name]), None)
