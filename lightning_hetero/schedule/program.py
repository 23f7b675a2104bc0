"""Programs: the order in which each device does its actions, written down as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.rule import Schedule
from lightning_hetero.schedule.work_queue import WorkQueue

Program = Sequence[Action]
"""What one device does, in this order. No idle slots: when each action runs is for the world to decide."""

Programs = Mapping[int, Program]
"""The program of each device, by its index."""


def make_programs(schedule: Schedule, pipeline: Pipeline) -> dict[int, tuple[Action, ...]]:
    """The order in which workers that obey the schedule act if each action takes as long and transfers are instant.

    Example:
        >>> from lightning_hetero.schedule import OneFOneB, Pipeline, make_programs
        >>> programs = make_programs(OneFOneB(spare=0), Pipeline(device_of=(0, 1), micro_batches=3))
        >>> print(format_programs(programs))
        0F0,0F1,0B0,0F2,0B1,0B2
        1F0,1B0,1F1,1B1,1F2,1B2
    """
    queues = {device: WorkQueue(schedule, pipeline) for device in sorted(pipeline.devices)}
    programs: dict[int, list[Action]] = {device: [] for device in queues}
    arrived = [*pipeline.starts()]
    while arrived or any(queues.values()):
        for action in arrived:
            queues[pipeline.device_of[action.stage]].add(action)
        taken = {device: now for device, queue in queues.items() if (now := queue.take()) is not None}
        assert taken, f"the rule {schedule.name!r} got stuck, which `bounds` should have ruled out"
        for device, action in taken.items():
            programs[device].append(action)
        arrived = [later for action in taken.values() for later in pipeline.unlocks(action)]
    return {device: tuple(program) for device, program in programs.items()}


def format_programs(programs: Programs) -> str:
    """One line for each device from 0, its actions separated by commas: the table that torch reads and writes."""
    lines = [",".join(map(str, programs.get(device, ()))) for device in range(max(programs, default=-1) + 1)]
    return "\n".join(lines)


def parse_programs(text: str) -> dict[int, tuple[Action, ...]]:
    """Read what `format_programs` wrote, or a table of torch's; its idle slots, empty cells, are passed over.

    Raises:
        ScheduleError: A cell is not an action.
    """
    return {
        device: tuple(Action.parse(cell) for cell in line.split(",") if cell.strip())
        for device, line in enumerate(text.splitlines())
    }
