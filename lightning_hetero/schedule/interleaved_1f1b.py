"""The schedule `interleaved_1f1b`: 1F1B where each device owns several stages, for a shorter warm-up and drain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.one_f_one_b import OneFOneB
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import alternating, register_schedule


@register_schedule("interleaved_1f1b")
@dataclass(frozen=True)
class Interleaved1F1B(OneFOneB):
    """Take micro-batches in rounds, about one for each device, and each round through all stages of a device.

    Meant for stages dealt out in turn, such as to the devices (0, 1, 0, 1); any other deal works too.

    Attributes:
        spare: Micro-batches in flight on each stage beyond what equal stages and instant transfers need.

    References:
        Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters, SC 2021, section 2.2.
        The rounds are those of torch's `ScheduleInterleaved1F1B`, which refuses unequal ones.
    """

    name: ClassVar[str] = "interleaved_1f1b"

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        """Round after round: forwards from the device's first stage to its last, backwards from last to first."""
        lap, laps, size, warm_up = _place(action.stage, pipeline.device_of, pipeline.micro_batches)
        start = action.micro_batch // size * size
        here = min(size, pipeline.micro_batches - start)  # the last round may be smaller
        turn = lap if action.op == "F" else laps - 1 - lap
        index = start * laps + turn * here + action.micro_batch - start
        return alternating(action.op, index, warm_up)

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        """The forwards of the stage up to its first backward, and the spare ones."""
        lap, laps, size, warm_up = _place(stage, pipeline.device_of, pipeline.micro_batches)
        # Before that, the device has warmed up, and alternated through the backwards of its later stages.
        rounds, rest = divmod(warm_up + 1 + (laps - 1 - lap) * size, laps * size)
        return rounds * size + min(max(rest - lap * size, 0), size) + self.spare


@lru_cache(maxsize=4096)
def _place(stage: int, device_of: tuple[int, ...], micro_batches: int) -> tuple[int, int, int, int]:
    """Where a stage stands: the same for all of its actions, so it is remembered.

    Returns:
        Which of its device's stages this is; how many the device has; micro-batches of a round; and forwards of the
        device before it alternates, which are a round through all its stages but the last, and the way to the end of
        the devices and back.
    """
    device, devices = device_of[stage], tuple(dict.fromkeys(device_of))
    lap, laps = device_of[:stage].count(device), device_of.count(device)
    rounds = max(1, micro_batches // len(devices))
    size = -(-micro_batches // rounds)
    behind = len(devices) - 1 - devices.index(device)
    return lap, laps, size, (laps - 1) * size + 2 * behind
