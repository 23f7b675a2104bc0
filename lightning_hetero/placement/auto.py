"""The policy `auto`: the best single device if the model fits there, several devices if it does not."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.placement.memory_first import MemoryFirstPolicy
from lightning_hetero.placement.policy import Placement, Problem, register_policy
from lightning_hetero.placement.single import first_fit


@register_policy("auto")
@dataclass(frozen=True)
class AutoPolicy:
    """Never slower than the best single device, and fits where no single device does.

    As long as stages run one after the other (connected mode), a second device can only add transfers. So the
    model stays on the first device that holds it, and is spread by memory otherwise.
    """

    name: str = "auto"

    def place(self, problem: Problem) -> Placement:
        """Choose between one device and several."""
        device = first_fit(problem)
        if device is None:
            spread = MemoryFirstPolicy().place(problem)
            note = "The model fits on no single device, so it is spread by memory."
            return Placement(device_of=spread.device_of, notes=(note, *spread.notes))
        notes = [f"The model fits on {device}, so it stays there."]
        idle = [d.name for d in problem.inventory.trainable if d.name != device]
        if idle:
            notes.append(
                f"{', '.join(idle)} {'stays' if len(idle) == 1 else 'stay'} idle: stages run one after the other, "
                "so using more devices would only add transfers."
            )
        return Placement(device_of=dict.fromkeys(problem.graph.names, device), notes=tuple(notes))
