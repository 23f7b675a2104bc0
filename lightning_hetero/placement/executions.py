"""The ways in which a batch may run: numbers of micro-batches, schedules, rematerialization."""

from __future__ import annotations

from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.forecast import FORWARD, WHOLE, Execution

MOST_MICRO_BATCHES = 64
"""Where the search ends: a pipeline of 8 stages is idle for a tenth of the step then, and each part costs overhead."""


def executions(problem: Problem, rows: int) -> tuple[Execution, ...]:
    """All ways to run a batch of so many rows over several devices that the problem allows; at least one."""
    counts = _counts(problem, rows)
    found = []
    for schedule in dict.fromkeys(problem.schedules):
        if schedule == WHOLE:
            found += [Execution()] if counts[0] == 1 else []
        elif schedule == FORWARD and problem.coupled and found:
            continue  # it would run whole, which is among them
        elif schedule == FORWARD:
            again = {None: (False, True), True: (True,), False: (False,)}[problem.rematerialize]
            found += [
                Execution(micro_batches=count, schedule=FORWARD, rematerialize=remat)
                for count in counts
                for remat in again
                if count > 1 or remat or WHOLE not in problem.schedules
            ]
        else:
            found += [Execution(micro_batches=count, schedule=schedule) for count in counts]
    return tuple(found)


def on_one_device(problem: Problem, found: tuple[Execution, ...]) -> tuple[Execution, ...]:
    """The ways to run a batch on one device: whole where that is allowed, or by a schedule of steps, for its memory."""
    given = (Execution(), *found) if WHOLE in problem.schedules else found
    return tuple(dict.fromkeys(as_on_one_device(execution) for execution in given))


def as_on_one_device(execution: Execution) -> Execution:
    """How it runs on one device, where "forward" has no border at which to cut a batch."""
    return Execution() if execution.schedule == FORWARD else execution


def sparse(executions: tuple[Execution, ...]) -> list[Execution]:
    """One way to run for 1, 4 and 16 micro-batches, or the nearest numbers that there are."""
    counts = sorted({execution.micro_batches for execution in executions})
    chosen = {min(counts, key=lambda count: abs(count - wanted)) for wanted in (1, 4, 16)}
    return [next(e for e in executions if e.micro_batches == count) for count in sorted(chosen)]


def _counts(problem: Problem, rows: int) -> list[int]:
    if problem.micro_batches is not None:
        return [problem.micro_batches]
    return [1 << power for power in range(MOST_MICRO_BATCHES.bit_length()) if 1 << power <= max(1, rows)]
