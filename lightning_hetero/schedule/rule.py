"""What a schedule is, how schedules are found by name, and the bound that each of them must keep."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Protocol, TypeVar, runtime_checkable

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline


@runtime_checkable
class Schedule(Protocol):
    """A rule for the order of work: which ready action goes first, and how much may be in flight.

    It is a rule and not a table because a table assumes that stages are equal: one late micro-batch stalls
    it, while a worker that asks for the next of its *ready* actions goes on. `WorkQueue` turns the rule into
    answers for a worker or a simulator, `make_programs` into a table. A schedule is pure and keeps no state.
    """

    @property
    def name(self) -> str:
        """The word for it on command lines and in messages."""

    @property
    def all_forwards_first(self) -> bool:
        """Whether a stage begins no backward before its last forward, as when the loss needs the whole batch."""

    @property
    def splits_backward(self) -> bool:
        """Whether it is meant for the ops `("F", "I", "W")`; it works with the others too."""

    def priority(self, action: Action, pipeline: Pipeline) -> int:
        """Place of the action on its device if all stages were equal; of the ready actions the lowest goes first."""

    def in_flight(self, stage: int, pipeline: Pipeline) -> int:
        """How many micro-batches the stage may hold at once, from forward to the end of backward; at least 1.

        The bound is one of stages, not of devices, for a reason: under the bound of a stage some worker always
        has something to do, whatever the priorities, while a bound shared by the stages of a device can be
        used up by its first stage, and its later ones wait for ever.
        """


ScheduleFactory = Callable[[], Schedule]
_Factory = TypeVar("_Factory", bound=ScheduleFactory)
_SCHEDULES: dict[str, ScheduleFactory] = {}


def register_schedule(name: str) -> Callable[[_Factory], _Factory]:
    """Class decorator that makes a schedule available as `schedule="name"`.

    The class must be constructible without arguments. Registering a name again replaces it.
    """

    def register(factory: _Factory) -> _Factory:
        _SCHEDULES[name] = factory
        return factory

    return register


def schedule_names() -> tuple[str, ...]:
    """The names that `get_schedule` knows."""
    return tuple(sorted(_SCHEDULES))


def get_schedule(name: str) -> Schedule:
    """A new schedule of that name, with its defaults.

    Raises:
        ScheduleError: No schedule has that name; the message lists those that exist.
    """
    if name not in _SCHEDULES:
        near = get_close_matches(name, _SCHEDULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ScheduleError(f"unknown schedule {name!r}.{hint} Known are {', '.join(schedule_names())}.")
    return _SCHEDULES[name]()


def bounds(schedule: Schedule, pipeline: Pipeline) -> tuple[int, ...]:
    """How many micro-batches each stage may hold at once, never more than there are.

    The first entry is the number of micro-batches in flight in the whole pipeline; times the bytes that a
    forward keeps, each entry is what its stage needs room for.

    Raises:
        ScheduleError: Work would get stuck: a stage may hold nothing, or too little to finish all forwards first.
    """
    held = [min(schedule.in_flight(stage, pipeline), pipeline.micro_batches) for stage in range(pipeline.stages)]
    least = pipeline.micro_batches if schedule.all_forwards_first else 1
    for stage, most in enumerate(held):
        if most < least:
            why = "all forwards come first" if schedule.all_forwards_first else "each has to pass"
            raise ScheduleError(
                f"schedule {schedule.name!r} would get stuck: stage {stage} may hold {most} of "
                f"{pipeline.micro_batches} micro-batches, but {why}; in_flight has to answer {least} or more"
            )
    return tuple(held)


def alternating(op: str, index: int, warm_up: int) -> int:
    """Place of a device's forward or backward number `index` if it warms up and then alternates.

    That is `warm_up` forwards, then forward and backward in turn, then the backwards that are left. Every
    schedule here is this with its own warm-up and its own numbering.

    Example:
        >>> place = {f"{op}{index}": alternating(op, index, warm_up=1) for op in "FB" for index in range(3)}
        >>> " ".join(sorted(place, key=place.get))
        'F0 F1 B0 F2 B1 B2'
    """
    return max(index, 2 * index - warm_up) if op == "F" else 2 * index + warm_up + 1
