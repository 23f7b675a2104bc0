"""The policy `even`: as many units on every device, the habit of equal machines and a baseline here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_hetero.placement.pieces import Piece, device_map, pieces_of
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem


@register_policy("even")
@dataclass(frozen=True)
class EvenPolicy:
    """Give each usable device one run of consecutive units, as equal in number as can be.

    Units that must stand together count as one, at the place of their first member. Speed and memory are
    not looked at: that is what makes it a baseline. With more devices than units the last devices stay idle.
    Units that must not stand on the device whose turn it is go to the nearest one in the list that is allowed.
    """

    name: str = "even"

    def place(self, problem: Problem) -> Placement:
        """Deal the units out."""
        pieces = pieces_of(problem)
        homes = self.homes(problem, pieces)
        count, able = min(len(problem.usable), len(pieces)), len(problem.usable)
        return Placement(
            device_of=device_map(pieces, homes),
            notes=(f"Units are shared out evenly over {count} of {able} devices, whatever their speed.",),
        )

    def homes(self, problem: Problem, pieces: tuple[Piece, ...]) -> tuple[str, ...]:
        """The device of every piece."""
        names = [device.name for device in problem.usable]
        count = min(len(names), len(pieces))
        return nearest(pieces, names, [index * count // len(pieces) for index in range(len(pieces))])


def nearest(pieces: Sequence[Piece], names: Sequence[str], wanted: Iterable[int]) -> tuple[str, ...]:
    """For every piece, the device that may hold it and is nearest, in the list of names, to the wanted one."""
    return tuple(
        min(piece.devices, key=lambda name: abs(names.index(name) - spot))
        for piece, spot in zip(pieces, wanted, strict=True)
    )
