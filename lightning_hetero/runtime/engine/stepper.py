"""Runs training steps in micro-batches: rehearses the first one, then lets them flow if that is safe."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.engine.batch import Path, batch_rows, cut_rows, not_of_rows, offsets
from lightning_hetero.runtime.engine.batch_norm import uses_batch
from lightning_hetero.runtime.engine.calls import Calls
from lightning_hetero.runtime.engine.gate import Seen
from lightning_hetero.runtime.engine.gates import Gates
from lightning_hetero.runtime.engine.in_turn import InTurn
from lightning_hetero.runtime.engine.intercept import Region
from lightning_hetero.runtime.engine.meanwhile import Meanwhile
from lightning_hetero.runtime.engine.notes import Elsewhere, Noted, recorder
from lightning_hetero.runtime.engine.order import NO_ORDER, Order, order_of
from lightning_hetero.runtime.engine.snapshot import Snapshot
from lightning_hetero.runtime.engine.sources import OtherSources
from lightning_hetero.runtime.engine.step import StepCall, StepTask
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.turning import TurningPoint
from lightning_hetero.runtime.engine.twin import Contents, Direct, Uses, handed_on, shadow_of, twin_of
from lightning_hetero.runtime.engine.watch import Watch
from lightning_hetero.runtime.frames import HERE
from lightning_hetero.schedule import Op, Schedule, bounds
from lightning_hetero.schedule.rows import split_rows

_MISSING = object()

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.engine import Engine

Look = Callable[[Any], None]
AroundFirst = Callable[[float], AbstractContextManager[Look]]


def look_away(output: Any) -> None:
    """A `Look` for whom nobody asked."""


_ONE_BY_ONE = "micro-batches of the training step run one after the other, because"


@dataclass(slots=True)
class StepResult:
    """What a step in micro-batches did.

    Attributes:
        loss: The loss of the batch, with its graph; None if the step returned none.
        outputs: What the user's step returned for each micro-batch.
        rows: Rows of each micro-batch.
        notes: Calls of recorded methods, for each micro-batch in order.
    """

    loss: Tensor | None
    outputs: Sequence[Any]
    rows: Sequence[int]
    notes: Sequence[Sequence[Noted]]


@dataclass(slots=True)
class _Mode:
    """What a rehearsal found for one kind of batch."""

    reason: str | None
    draws: bool = False
    own_code_draws: bool = False
    order: Order = NO_ORDER
    turning_point: TurningPoint = field(default_factory=TurningPoint)


@dataclass(slots=True)
class _Step:
    """One step on its way."""

    args: tuple[Any, ...]
    rows: list[int]
    notes: list[list[Noted]] = field(default_factory=list)
    uses: dict[int, Uses] = field(default_factory=dict)
    direct: Direct = field(default_factory=Direct)
    kind: type | None = None  # of the module, which has another class while what is done to it is noted


class Stepper:
    """Runs the step of a module in micro-batches.

    The first step with a new kind of batch runs them one after the other, which is right in any case, and looks
    for what they hand on from one to the next: such steps go on in this way, all others in lanes. Random numbers are
    the same in both ways, so it does not matter which step is the first: a run that resumes has one too.

    Args:
        engine: Workers, lanes, generators.
        module: The module whose method `step` is run.
        step: Name of that method.
        schedule: In what order.
        recorded: Names of methods of the module whose calls are noted instead of made.
        gated: Modules that micro-batches have to use in order (metrics).
        seen: Told of each of their calls, in this order; see `Gate`.
    """

    def __init__(
        self,
        engine: Engine,
        module: nn.Module,
        step: str,
        schedule: Schedule,
        recorded: Sequence[str],
        gated: Sequence[nn.Module],
        seen: Seen | None = None,
    ) -> None:
        self._engine = engine
        self._module = module
        self._name = step
        self._schedule = schedule
        self._recorded = recorded
        self._elsewhere = Elsewhere(module, recorded)
        self._gates = Gates(seen)
        self._modes: dict[Any, _Mode] = {}
        self._whole: set[Path] = set()  # where in batches nothing is cut, as some batch had other rows there
        self._tables: dict[int, Mapping[tuple[int, Op, int], int]] = {}
        self._bounds: dict[int, int] = {}
        for each in gated:
            self._gates.add(each)

    def close(self) -> None:
        """Take the gates off."""
        self._gates.remove()

    def run(self, args: tuple[Any, ...], scale: float, around_first: AroundFirst | None = None) -> StepResult | None:
        """Run one step.

        Args:
            args: Arguments of the user's step; the first is the batch.
            scale: What the loss will be multiplied with before the host's backward.
            around_first: What the first micro-batch is to run in, given how many times as many rows the batch has;
                micro-batches run one after the other then. It gives what is to see the result. It is left out of a
                step that is a rehearsal.

        Returns:
            The result; None if the batch cannot be cut, and nothing has been done.
        """
        if self._gates.follow(self._module):
            self._modes.clear()  # the next step is rehearsed again
        total = batch_rows(args[0])
        if total is None or total < 2:
            self._runs_once("its batch has no rows to cut")
            return None
        self._whole.update(not_of_rows(args[0], total))
        rows = self._rows(total)
        if len(rows) < 2:
            self._runs_once("batch normalisation needs two rows of each")
            return None
        step = _Step(args, rows, kind=type(self._module))
        step.notes = [[] for _ in step.rows]
        given = Tree(args[0])
        key = tuple((tensor.dim(), tensor.dtype) for tensor in given.tensors)
        mode = self._modes.get(key)
        if mode is None:
            self._elsewhere.find()
        with self._elsewhere.noting(step.notes):
            if mode is None:
                call, self._modes[key] = self._rehearse(step, scale)
            elif mode.reason is not None or around_first is not None:
                call = self._in_turn(step, scale, mode, around_first)
            else:
                before = {} if mode.draws else self._engine.generators.states()
                call = self._in_lanes(step, scale, mode)
                if self._engine.generators.drawn_since(before):
                    del self._modes[key]  # the next step is rehearsed again, and sees who draws
        return StepResult(call.loss(), call.outputs, step.rows, step.notes)

    def _runs_once(self, reason: str) -> None:
        why = f"the training step is not cut into micro-batches, because {reason}"
        self._engine.note(why, "It runs once on the whole batch.")

    def _rows(self, total: int) -> list[int]:
        """Rows of each micro-batch: at least two where they are normalised, as a single value has no variance."""
        rows = self._engine.split(total)
        if min(rows) < 2 and any(map(uses_batch, self._module.modules())):
            return split_rows(total, min(self._engine.micro_batches, total // 2))
        return rows

    # Ways to run

    def _in_lanes(self, step: _Step, scale: float, mode: _Mode) -> StepCall:
        contents, before = Contents(self._module), dict(self._module.__dict__)
        seed = _seed() if mode.draws else None
        call = self._call(
            step,
            scale,
            self._run_beside_the_others,
            seed,
            mode.own_code_draws,
            mode.order,
            turning_point=mode.turning_point,
        )
        states = self._engine.generators.states() if mode.draws else {}  # one number was drawn for the seed
        try:
            with step.direct.noting(self._module):
                call.in_lanes()
        finally:
            self._engine.generators.restore(states)
        uses = [step.uses[index] for index in sorted(step.uses)]
        self._nothing_past_twins(before, uses, step.direct)
        name = handed_on(uses) or contents.changed()
        if name is not None:
            raise UnsupportedError(
                f"self.{name} goes from one micro-batch to the next in training_step, which it did not do in the first "
                "step, so micro-batches were under way at the same time. Set micro_batching='forward'."
            )
        for use in uses:
            use.apply_to(self._module, self._own_names)
        return call

    def _in_turn(self, step: _Step, scale: float, mode: _Mode, around_first: AroundFirst | None) -> StepCall:
        """Run one after the other."""
        numbers = InTurn(self._engine.generators, _seed()) if mode.draws else None

        def run(index: int, step: _Step) -> Any:
            around = around_first if index == 0 else None
            with nullcontext(look_away) if around is None else around(sum(step.rows) / step.rows[0]) as look:
                with (
                    nullcontext() if numbers is None else numbers.micro_batch(index),
                    self._alone(index, step) as batch,
                ):
                    output = getattr(self._module, self._name)(batch, *step.args[1:])
                look(output)
                return output

        call = self._call(step, scale, run)
        with self._engine.inline() if numbers is None else self._engine.watching(numbers):
            call.one_by_one()
        return call

    def _rehearse(self, step: _Step, scale: float) -> tuple[StepCall, _Mode]:
        """Run one after the other, and look for reasons to go on in this way."""
        before, others = torch.get_rng_state(), OtherSources()
        watch = Watch(self._engine.generators, InTurn(self._engine.generators, _seed()))
        snapshot = Snapshot(self._module)
        gates, gated = self._gates, self._gates.gated
        meanwhile = Meanwhile(snapshot.modules, gated, snapshot.inside(gated), snapshot.names)
        calls = Calls(watch, meanwhile, self._engine.generators, gates.note_reading)
        watch.at_border = meanwhile.at_border
        passed: list[list[Hashable]] = []

        def run(index: int, step: _Step) -> Any:
            with watch.micro_batch(index), self._alone(index, step) as batch:
                output = self._run_seen(index, batch, step)
            passed.append([*watch.in_order, *gates.take_calls()])
            watch.in_order.clear()
            return output

        call = self._call(step, scale, run, in_backward=watch.backward)
        with (
            gates.watched(lambda: watch.in_unit),
            self._engine.watching(watch),
            calls,
            self._elsewhere.asking(calls.log_is_called),
        ):
            call.one_by_one()
        watch.end()
        meanwhile.end()
        if not watch.any:
            torch.set_rng_state(before)  # the seed was not needed, and no step to come draws one
        reason = self._reason(step, watch, calls, others)
        if call.accumulates:
            reason = reason or "code of its backward adds to gradients of parameters by itself"
        reason = reason or snapshot.change_below(ignored=gated, in_order=self._engine.in_units)
        of_metrics = gates.reason()
        reason = reason or of_metrics
        reason = reason or meanwhile.change
        if reason is None and (name := snapshot.changed_buffer(calls.read, self._engine.in_units)) is not None:
            reason = f"it reads {name}, which a part changes"
        if reason is None and (drawer := calls.sets_numbers_back) is not None:
            reason = f"{drawer} draws random numbers and sets their generator back"
        if reason is None and snapshot.of_thread is not None:
            reason = f"its code uses {snapshot.of_thread}, whose value each thread has for itself"
        if reason is None and snapshot.sets_numbers_back(self._name):
            reason = "its code sets random numbers of Python or NumPy back"
        if reason is None and (iterator := snapshot.iterator_used(self._name)) is not None:
            reason = f"it uses {iterator}"
        for unit in watch.units:
            unit.draws = True
        if reason is not None:
            self._engine.note(f"{_ONE_BY_ONE} {reason}", "The results are the same as in lanes.")
        return call, _Mode(reason, watch.any, watch.own_code, order_of(passed, watch.stateful))

    def _reason(self, step: _Step, watch: Watch, calls: Calls, others: OtherSources) -> str | None:
        """Why micro-batches must not be under way at the same time, in words that follow "because"."""
        uses, drawn = list(step.uses.values()), others.drawn()
        name = handed_on(uses)
        past = step.direct.written.union(*(step.direct.read & use.written for use in uses)) - {*self._own_names}
        if name is not None:
            return f"self.{name} goes from one batch to the next"
        if past:
            return f"self.{min(past)} is set, or read after it was set, by code that has the module in another way"
        if watch.changer is not None:
            return f"{watch.changer} changes its input in place"
        if watch.writer is not None:
            return f"{watch.writer} writes into a container that it is given"
        if drawn is not None:
            return f"it {drawn}"
        if watch.stray_draws is not None:
            return watch.stray_draws
        if watch.own_code and calls.checkpoints:
            return "its code draws random numbers under activation checkpointing"
        if watch.runs_again is not None:
            return f"{watch.runs_again} keeps state, and its forward runs again under activation checkpointing"
        if (caller := next((unit for unit in watch.callers if unit.runs_again), None)) is not None:
            return f"{caller.name} calls another part, and its forward runs again under activation checkpointing"
        if calls.writes_to_data:
            return "the data of a parameter are changed"
        if calls.reason is None and watch.called_in_backward is not None:
            return f"code of its backward calls {watch.called_in_backward}"
        return calls.reason

    def _call(
        self,
        step: _Step,
        scale: float,
        run: Callable[[int, _Step], Any],
        seed: int | None = None,
        own_code_draws: bool = False,
        order: Order = NO_ORDER,
        in_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
        turning_point: TurningPoint | None = None,
    ) -> StepCall:
        task = StepTask(
            run=lambda index: run(index, step),
            rows=step.rows,
            scale=scale,
            in_flight=self._in_flight(len(step.rows)),
            places=self._places(len(step.rows)),
            forwards_first=self._schedule.all_forwards_first,
            leaves=[parameter for parameter in self._module.parameters() if parameter.requires_grad],
            seed=seed,
            own_code_draws=own_code_draws,
            order=order,
            in_backward=in_backward,
            turning_point=turning_point or TurningPoint(),
        )
        return StepCall(self._engine, self._engine.next_call(), task)

    def _in_flight(self, micro_batches: int) -> int:
        """How many micro-batches may be under way at once; worked out once."""
        if micro_batches not in self._bounds:
            most = bounds(self._schedule, self._engine.pipeline(micro_batches))[0]
            self._bounds[micro_batches] = most + self._engine.more_devices
        return self._bounds[micro_batches]

    def _places(self, micro_batches: int) -> Mapping[tuple[int, Op, int], int]:
        """The schedule as a table, made once."""
        if micro_batches not in self._tables:
            pipeline = self._engine.pipeline(micro_batches)
            self._tables[micro_batches] = {
                (action.stage, action.op, action.micro_batch): self._schedule.priority(action, pipeline)
                for action in pipeline.actions()
            }
        return self._tables[micro_batches]

    def _run_beside_the_others(self, index: int, step: _Step) -> Any:
        twin = twin_of(self._module, self._own(index, step), step.kind)
        step.uses[index] = Uses(twin)
        first = offsets(step.rows)
        batch = cut_rows(step.args[0], first[-1], first[index], first[index + 1], self._whole)
        HERE.part_of_batch = step.rows[index] / first[-1]
        try:
            return getattr(twin, self._name)(batch, *step.args[1:])
        finally:
            HERE.part_of_batch = 1.0
            step.uses[index].look_past_setting()

    @contextmanager
    def _alone(self, index: int, step: _Step) -> Iterator[Any]:
        """Within the block, which is given the rows of a micro-batch, nobody else runs: `self` is the module itself."""
        self._elsewhere.index = index
        first, attributes = offsets(step.rows), self._module.__dict__
        region = attributes.get("forward")
        if isinstance(region, Region):
            del attributes["forward"]  # calls of the module run in this thread, and not for a batch of their own
        HERE.part_of_batch = step.rows[index] / first[-1]
        try:
            yield cut_rows(step.args[0], first[-1], first[index], first[index + 1], self._whole)
        finally:
            HERE.part_of_batch = 1.0
            if isinstance(region, Region):
                attributes.setdefault("forward", region)

    def _run_seen(self, index: int, batch: Any, step: _Step) -> Any:
        """Run with something that is told from the module itself, and has the same attributes."""
        shadow = shadow_of(self._module)
        uses = step.uses[index] = Uses(shadow)
        try:
            with step.direct.noting(self._module):
                return getattr(shadow, self._name)(batch, *step.args[1:])
        finally:
            uses.look_past_setting()
            if uses.set_on_class:
                raise UnsupportedError(_past_twins(f"type(self).{uses.set_on_class[0]}", is_later=False))

    def _nothing_past_twins(self, before: Mapping[str, Any], uses: Sequence[Uses], direct: Direct) -> None:
        """See to it that nothing was set on the module itself, or its class: micro-batches read what their twins have.

        Raises:
            UnsupportedError: Something was; or it was read, and a twin had another value.
        """
        now = self._module.__dict__
        names = {name for name in {**before, **now} if now.get(name, _MISSING) is not before.get(name, _MISSING)}
        names |= direct.written.union(*(direct.read & use.written for use in uses))
        past = [f"self.{name}" for name in sorted(names) if name not in self._own_names]
        past += [f"type(self).{name}" for use in uses for name in use.set_on_class]
        if past:
            raise UnsupportedError(_past_twins(past[0]))

    @property
    def _own_names(self) -> Sequence[str]:
        """Names of attributes that a twin has for itself."""
        return ("forward", *self._recorded)

    def _own(self, index: int, step: _Step) -> dict[str, Any]:
        """Their values for one micro-batch; None for those that are to be missing."""
        own: dict[str, Any] = {name: recorder(name, step.notes[index]) for name in self._recorded}
        if isinstance(self._module.__dict__.get("forward"), Region):
            own["forward"] = None  # that of the class, so that `self` is the twin in it
        return own


def _past_twins(name: str, *, is_later: bool = True) -> str:
    later = ", which it was not in the first step" if is_later else ""
    return (
        f"{name} is set in training_step, or read after it was set, by another way than through self (a hook or a "
        f"bound method that was handed on, the Trainer's lightning_module, the class){later}. Micro-batches have a "
        "self of their own each and do not see it. Do it through self in training_step, or set "
        "micro_batching='forward'."
    )


def _seed() -> int:
    return int(torch.randint(1 << 62, (), device="cpu"))
