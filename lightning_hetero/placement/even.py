"""The policy `even`: as many units on every device, the habit of equal machines and a baseline here."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.placement.policy import Placement, Problem, register_policy


@register_policy("even")
@dataclass(frozen=True)
class EvenPolicy:
    """Give each trainable device one run of consecutive units, as equal in number as can be.

    Units that must stand together count as one, at the place of their first member. Speed and memory are
    not looked at: that is what makes it a baseline. With more devices than units the last devices stay idle.
    """

    name: str = "even"

    def place(self, problem: Problem) -> Placement:
        """Deal the units out."""
        devices = problem.inventory.trainable
        groups = problem.graph.groups
        count = min(len(devices), len(groups))
        device_of = {}
        for index, group in enumerate(groups):
            device = devices[index * count // len(groups)].name
            device_of.update({unit.name: device for unit in group})
        return Placement(
            device_of=device_of,
            notes=(f"Units are shared out evenly over {count} of {len(devices)} devices, whatever their speed.",),
        )
