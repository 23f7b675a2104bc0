"""Devices that obey programs, for tests that need to see when things happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_hetero.schedule import Action, Pipeline, Programs, Span, Timeline

Seconds = Callable[[Action], float]
Obey = Callable[[Programs, Pipeline, Seconds], Timeline]


@pytest.fixture(scope="session")
def obey() -> Obey:
    """Runs programs as written on devices `dev0`, `dev1`, ... with instant transfers."""

    def run(programs: Programs, pipeline: Pipeline, seconds: Seconds) -> Timeline:
        ended: dict[Action, float] = {}
        free_s = dict.fromkeys(programs, 0.0)
        todo = {device: [*program] for device, program in programs.items()}
        spans = []
        while any(todo.values()):
            device = next(d for d, left in todo.items() if left and all(n in ended for n in pipeline.needs(left[0])))
            action = todo[device].pop(0)
            start_s = max([free_s[device], *(ended[need] for need in pipeline.needs(action))])
            ended[action] = free_s[device] = start_s + seconds(action)
            spans.append(
                Span(
                    device=f"dev{device}",
                    op=action.op,
                    stage=action.stage,
                    micro_batch=action.micro_batch,
                    start_s=start_s,
                    duration_s=seconds(action),
                )
            )
        return Timeline(tuple(spans), tuple(f"dev{device}" for device in programs))

    return run
