"""The policy `single`: everything on one device."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.placement.policy import Placement, Problem, register_policy


@register_policy("single")
@dataclass(frozen=True)
class SinglePolicy:
    """Put the whole model on one device.

    Args:
        device: Its name; None takes the first device, in the order of the inventory, on which the model
            fits, and the one with most memory if it fits on none.
    """

    device: str | None = None
    name: str = "single"

    def place(self, problem: Problem) -> Placement:
        """Choose the device."""
        device = self.device or first_fit(problem) or _roomiest(problem)
        problem.inventory[device]  # raises with the list of devices if there is no such name
        return Placement(device_of=dict.fromkeys(problem.graph.names, device), notes=(f"All units stand on {device}.",))


def first_fit(problem: Problem) -> str | None:
    """The first trainable device that has room for all units, or None."""
    need = problem.need_bytes(problem.graph.units)
    return next((name for name, room in problem.room_bytes().items() if need <= room), None)


def _roomiest(problem: Problem) -> str:
    room = problem.room_bytes()
    return max(room, key=room.__getitem__)
