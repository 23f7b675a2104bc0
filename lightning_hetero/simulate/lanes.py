"""Micro-batches in lanes: each goes through its own tasks, each device takes the lowest lane that waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple


class Task(NamedTuple):
    """What a device does with a micro-batch in one go.

    Attributes:
        device: Index of the device.
        op: Such as "F".
        stage: Index of the stage.
        in_s: Fetching.
        work_s: Computing.
        out_s: Sending.
    """

    device: int
    op: str
    stage: int
    in_s: float
    work_s: float
    out_s: float


class Start(NamedTuple):
    """When a task begins.

    Attributes:
        at_s: The time.
        lane: Index of the micro-batch.
        task: The task.
    """

    at_s: float
    lane: int
    task: Task


def run_lanes(lanes: Sequence[Sequence[Task]], begin_s: float, in_flight: int) -> tuple[list[Start], float]:
    """When each task begins, and when the last one ends.

    Args:
        lanes: The tasks of every micro-batch, one after the other.
        begin_s: When the first ones can begin.
        in_flight: How many lanes may be under way at once; a further one begins when another ends.
    """
    starts: list[Start] = []
    done = [0] * len(lanes)  # tasks of each lane that are over
    following = min(in_flight, len(lanes))
    ready = list(range(following))
    waiting: dict[int, list[int]] = {task.device: [] for lane in lanes for task in lane}
    idle = set(waiting)
    events: list[tuple[float, int, int]] = []  # when a task ends, its lane, its device
    now_s = begin_s
    while True:
        for lane in ready:
            heappush(waiting[lanes[lane][done[lane]].device], lane)
        for device in sorted(idle):
            if waiting[device]:
                lane = heappop(waiting[device])
                task = lanes[lane][done[lane]]
                starts.append(Start(now_s, lane, task))
                heappush(events, (now_s + task.in_s + task.work_s + task.out_s, lane, device))
                idle.remove(device)
        if not events:
            return starts, now_s
        now_s, ready = events[0][0], []
        while events and events[0][0] == now_s:  # all that ends at one time is known before any device chooses
            _, lane, device = heappop(events)
            idle.add(device)
            done[lane] += 1
            if done[lane] < len(lanes[lane]):
                ready.append(lane)
            elif following < len(lanes):
                ready.append(following)
                following += 1
