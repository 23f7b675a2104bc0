"""A placement policy that is as awkward as can be, to find out what only works by luck."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.placement import Placement, Problem, register_policy


@register_policy("round_robin")
@dataclass(frozen=True)
class RoundRobinPolicy:
    """The first unit off the root device, every further one on the next device: a border at every unit."""

    name: str = "round_robin"

    def place(self, problem: Problem) -> Placement:
        """Go round."""
        devices = [device.name for device in problem.inventory.trainable]
        device_of = {}
        for index, group in enumerate(problem.graph.groups):
            device_of.update({unit.name: devices[(index + 1) % len(devices)] for unit in group})
        return Placement(device_of=device_of, notes=("Every unit stands on another device than the one before.",))
