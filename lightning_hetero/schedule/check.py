"""The proof that programs can be obeyed: nothing missing, nothing too early, nothing too much, and no deadlock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.action import Action
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.schedule.program import Programs

_Place = tuple[int, int]  # device, step
_Fault = tuple[str, Sequence[_Place]]  # what is wrong, where the arrows point
_SHOWN = 6  # steps shown on either side of an arrow


def check_program(programs: Programs, pipeline: Pipeline, *, in_flight: Sequence[int] | None = None) -> None:
    """Prove that the devices can obey their programs, whatever each action takes.

    Args:
        programs: The program of each device.
        pipeline: What the programs are for.
        in_flight: How many micro-batches each stage may hold, shape (stages,), as `bounds` answers; None: any.

    Raises:
        ScheduleError: An action is missing, double or on the wrong device; or it stands before one that it needs;
            or a stage holds too much; or devices wait for each other. The text draws the programs with an arrow.
    """
    faults = chain(
        _strangers(programs, pipeline),
        _missing(programs, pipeline),
        _too_early(programs, pipeline),
        _too_many(programs, pipeline, in_flight),
        _deadlocks(programs, pipeline),
    )
    for what, where in faults:
        raise ScheduleError(f"{what}\n{_drawn(programs, where)}")


def _places(programs: Programs) -> Iterator[tuple[Action, _Place]]:
    for device in sorted(programs):
        for step, action in enumerate(programs[device]):
            yield action, (device, step)


def _strangers(programs: Programs, pipeline: Pipeline) -> Iterator[_Fault]:
    seen: dict[Action, _Place] = {}
    for action, place in _places(programs):
        if action not in pipeline:
            yield (
                f"{_at(place)}: {action} is no action of this pipeline, which has {pipeline.stages} stages, "
                f"{pipeline.micro_batches} micro-batches and the ops {', '.join(pipeline.ops)}; remove it",
                [place],
            )
        elif pipeline.device_of[action.stage] != place[0]:
            owner = pipeline.device_of[action.stage]
            yield f"{_at(place)}: {action} belongs to device {owner}, which owns stage {action.stage}", [place]
        elif action in seen:
            yield f"{_at(place)}: {action} is done already in step {seen[action][1]}; remove one of them", [place]
        seen.setdefault(action, place)


def _missing(programs: Programs, pipeline: Pipeline) -> Iterator[_Fault]:
    seen = {action for action, _ in _places(programs)}
    missing = [action for action in pipeline.actions() if action not in seen]
    if missing:
        device = pipeline.device_of[missing[0].stage]
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        yield f"device {device} never does {missing[0]}{more}; add it", [(device, len(programs.get(device, ())))]


def _too_early(programs: Programs, pipeline: Pipeline) -> Iterator[_Fault]:
    place_of = dict(_places(programs))
    for action, place in place_of.items():
        for need in pipeline.needs(action):
            device, step = place_of[need]
            if device == place[0] and step > place[1]:
                yield f"{_at(place)}: {action} needs {need}, which comes in step {step} only; move it behind", [place]


def _too_many(programs: Programs, pipeline: Pipeline, in_flight: Sequence[int] | None) -> Iterator[_Fault]:
    if in_flight is None:
        return
    if len(in_flight) != pipeline.stages:
        raise ScheduleError(f"in_flight has {len(in_flight)} numbers for {pipeline.stages} stages; `bounds` gives them")
    held: Counter[int] = Counter()
    for action, place in _places(programs):
        held[action.stage] += (action.op == "F") - (action.op == pipeline.ops[-1])
        most = in_flight[action.stage]
        if held[action.stage] > most:
            yield (
                f"{_at(place)}: {action} makes stage {action.stage} hold {held[action.stage]} micro-batches, but "
                f"{most} may be in flight there; put a backward of stage {action.stage} before it",
                [place],
            )


def _deadlocks(programs: Programs, pipeline: Pipeline) -> Iterator[_Fault]:
    """Run the programs until nobody can go on. Then every device left waits for another one that is left."""
    done: set[Action] = set()
    step = dict.fromkeys(programs, 0)
    heads = _heads(programs, step)
    while runnable := {d: a for d, a in heads.items() if done.issuperset(pipeline.needs(a))}:
        done.update(runnable.values())
        step.update((device, step[device] + 1) for device in runnable)
        heads = _heads(programs, step)
    if not heads:
        return
    awaited = {d: next(need for need in pipeline.needs(a) if need not in done) for d, a in heads.items()}
    circle = [min(heads)]
    while (following := pipeline.device_of[awaited[circle[-1]].stage]) not in circle:
        circle.append(following)
    circle = circle[circle.index(following) :]
    waits = [
        f"device {device} waits in step {step[device]} with {heads[device]} for {awaited[device]} of "
        f"device {pipeline.device_of[awaited[device].stage]}"
        for device in circle
    ]
    advice = "move one of these actions behind others of its device"
    yield f"deadlock: {'; '.join(waits)}; {advice}", [(device, step[device]) for device in circle]


def _heads(programs: Programs, step: Mapping[int, int]) -> dict[int, Action]:
    return {device: program[step[device]] for device, program in programs.items() if step[device] < len(program)}


def _at(place: _Place) -> str:
    return f"device {place[0]}, step {place[1]}"


def _drawn(programs: Programs, arrows: Sequence[_Place]) -> str:
    """The programs around the arrows, one row for each device."""
    first = max(min(step for _, step in arrows) - _SHOWN, 0)
    last = max(step for _, step in arrows) + _SHOWN
    wide = max((len(str(action)) for action, _ in _places(programs)), default=1)
    lines = []
    for device in sorted({*programs, *(device for device, _ in arrows)}):
        program = programs.get(device, ())
        cells = [str(action).ljust(wide) for action in program[first : last + 1]]
        label = f"  device {device}  " + ("... " if first else "")
        lines.append(label + " ".join(cells) + (" ..." if last + 1 < len(program) else ""))
        pointed = {step for at, step in arrows if at == device}
        if pointed:
            marks = [("^" * wide if step in pointed else "").ljust(wide) for step in range(first, last + 1)]
            lines.append(" " * len(label) + " ".join(marks))
    return "\n".join(line.rstrip() for line in lines)
