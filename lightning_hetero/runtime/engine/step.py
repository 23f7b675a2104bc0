"""A whole training step in micro-batches: the user's code runs once for each, and gradients are accumulated.

The meaning is that of gradient accumulation over the same micro-batches, each loss weighted by its share of the rows.
A micro-batch runs backward as soon as its forward is done, and at most one more of them than there are devices is under
way: the memory bound of 1F1B (Narayanan et al., "PipeDream: generalized pipeline parallelism for DNN training", 2019).

To the host the step returns one loss with one autograd node, which hands out the finished gradients when the host calls
backward: it may clear gradients in between, scale the loss, or accumulate over batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.engine.call import Call
from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.faults import Countdown, annotated
from lightning_hetero.runtime.engine.lanes import Lane
from lightning_hetero.runtime.engine.leaves import OWN_CODE, gradients, walk
from lightning_hetero.runtime.engine.order import NO_ORDER, Order
from lightning_hetero.runtime.engine.silence import spare
from lightning_hetero.runtime.engine.state import keeps_graph
from lightning_hetero.runtime.engine.streams import Stream, derive
from lightning_hetero.runtime.engine.turning import MUCH_BUSIER, PATIENCE, TurningPoint
from lightning_hetero.runtime.engine.turnstile import Turnstile
from lightning_hetero.runtime.engine.watch import has_hooks
from lightning_hetero.runtime.engine.worker import LONG_S, Worker
from lightning_hetero.schedule import Op

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.cut import Unit
    from lightning_hetero.runtime.engine.engine import Engine


_LOOK_AGAIN_S = 0.05  # how soon a waiting lane notices that another one has failed
_REENTRANT = (
    "The backward of a micro-batch asks for the gradients that it needs; a checkpoint with use_reentrant=True cannot "
    "give some and not others. Pass use_reentrant=False to torch.utils.checkpoint, which computes the same, or let the "
    'calls of modules run in micro-batches in place of the step: micro_batching="forward".'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTask:
    """What is to be done in one step.

    Attributes:
        run: Runs the user's step for the micro-batch with the given index; returns what it returned.
        rows: Rows of each micro-batch.
        scale: What the loss will be multiplied with before the host's backward.
        in_flight: How many micro-batches may be under way at once.
        places: In what order a device does what is there: the lowest place of (stage, op, micro-batch) first.
        forwards_first: Whether no backward begins before the last forward has ended.
        leaves: The parameters that may get gradients.
        seed: Where random numbers begin; None if none are drawn.
        own_code_draws: Whether the step's own code, outside of units, draws random numbers.
        order: What has to be used in order.
        in_backward: What backwards are to run in.
        turning_point: Where earlier micro-batches have turned back.
    """

    run: Callable[[int], Any]
    rows: Sequence[int]
    scale: float
    in_flight: int
    places: Mapping[tuple[int, Op, int], int]
    forwards_first: bool
    leaves: Sequence[nn.Parameter]
    seed: int | None = None
    own_code_draws: bool = False
    order: Order = NO_ORDER
    in_backward: Callable[[], AbstractContextManager[None]] = nullcontext
    turning_point: TurningPoint = field(default_factory=TurningPoint)


class StepCall(Call):
    """One training step in micro-batches.

    Args:
        engine: Workers, lanes, generators.
        number: Number of the call.
        task: What is to be done.

    Attributes:
        outputs: What the user's step returned for each micro-batch.
        accumulates: Whether code of a backward added to `grad` of parameters by itself, as far as that was looked for.
    """

    is_step = True

    def __init__(self, engine: Engine, number: int, task: StepTask) -> None:
        super().__init__(
            engine,
            number=number,
            name="the training step",
            rows=task.rows,
            seed=task.seed,
            checks_capture=False,
        )
        self._task = task
        self._busiest: Worker | None = None
        self.outputs: list[Any] = [None] * len(task.rows)
        self._found: list[list[Tensor]] = [[] for _ in task.rows]
        check = _check_of(weakref.ref(self))
        self._forward_turns = Turnstile(len(task.rows), check, task.order.once)
        # Code that runs again for the backward keeps an order of its own, as no lane waits there for a forward.
        self._backward_turns = Turnstile(len(task.rows), check)
        self._leaves: list[Tensor] = []
        self.accumulates = False
        self._forwards = Countdown(len(task.rows))

    def in_order(self, lane: Lane, unit: Unit) -> AbstractContextManager[None] | None:
        """Within the block, lower lanes are done with the unit; None unless it keeps state (running means, say)."""
        if not unit.has_state:
            return None
        key = self._task.order.keys.get(unit.number)
        if key is None:
            key = unit.number  # it was not called in the first step
            if any(id(module) in self._task.order.shared for module in unit.stateful):
                raise CannotCutError(f"it calls {unit.name}, which shares its buffers with another part")
        return self._turns_of(lane).passing(lane.index, key, unit.name)

    def _turns_of(self, lane: Lane) -> Turnstile:
        return self._backward_turns if lane.in_backward else self._forward_turns

    @contextmanager
    def passing(self, lane: Lane, key: Hashable, name: str) -> Iterator[None]:
        """Within the block, lower lanes are done with `key`; for the lane's own code."""
        if lane.stream is None:
            with self._turns_of(lane).passing(lane.index, key, name):
                yield
            return
        lane.stream.pause()  # a lower lane may need the generator to get here
        try:
            with self._turns_of(lane).passing(lane.index, key, name), lane.stream.running():
                yield
        finally:
            lane.stream.resume()

    def place(self, op: Op, unit: Unit, lane: Lane) -> int:
        """Place of a task on its device: that of the schedule."""
        return self._task.places[unit.stage, op, lane.index]

    def arrives(self, lane: Lane, worker: Worker) -> None:
        """A lane comes with its next task, for which no device has to wait any longer."""
        if lane.turned_s is not None:
            self._task.turning_point.note(perf_counter() - lane.turned_s)
            lane.turned_s = None
        self._goes_to(lane, worker)

    def _goes_to(self, lane: Lane, worker: Worker | None) -> None:
        """No other device has to wait for the lane any longer."""
        expected_by, lane.expected_by = lane.expected_by, None
        if expected_by is not None and expected_by is not worker:
            expected_by.expect_no_more(self.number, lane.index)

    def when_ended(self, unit: Unit, number: int, lane: Lane) -> Callable[[], None] | None:
        """After the last forward, let the device know that the backward is about to come."""
        if number != self._task.turning_point.number or self._task.forwards_first:
            return None
        return partial(self._turn_back, unit, lane)

    def _turn_back(self, unit: Unit, lane: Lane) -> None:
        lane.turned_s = perf_counter()
        worker = unit.worker
        patience_s = PATIENCE * worker.task_s
        if worker.task_s < LONG_S or worker is self._busiest or self._task.turning_point.loss_s > patience_s:
            return
        lane.expected_by = worker
        worker.expect(self.place("B", unit, lane), self.number, lane.index, lane.turned_s + patience_s)

    def _may_share(self, unit: Unit) -> bool:
        """Whether several devices may take part.

        State (running means, say) is kept once, and changes in order. Hooks of user code know the module itself.
        """
        return not unit.has_state and not any(has_hooks(part) for module in unit.parts for part in module.modules())

    def in_lanes(self) -> None:
        """Run all micro-batches at the same time.

        Raises:
            UnsupportedError: The step does something that cannot be cut.
        """
        self._mute(self._task.leaves)
        try:
            self.engine.interceptions.renew_replicas()
            self._busiest = self.engine.threads.much_busier(MUCH_BUSIER)
            self._start(self._lane, self._task.in_flight)
            self._finish()
            if self.engine.interceptions.replicas_changed_buffers:
                raise UnsupportedError(
                    "a module with replicas has changed a buffer in the training step, though it is in evaluation "
                    "mode; each replica has changed its own. Set micro_batching='forward', or leave out the replicas."
                )
            lost = self.engine.interceptions.lost_by_replicas
            if lost is not None:
                self.engine.note_lost(lost)
        except CannotCutError as refused:
            raise UnsupportedError(
                f"the training step cannot run in micro-batches, because {refused}, which it did not do in the first "
                "step. Set micro_batching='forward'."
            ) from refused
        finally:
            self._stop()
            self._unmute()

    def one_by_one(self) -> None:
        """Run the micro-batches one after the other in this thread: plain accumulation of gradients."""
        self._mute(self._task.leaves)
        try:
            for lane in self._lanes:
                self._step(lane, alone=True)
        finally:
            self._unmute()

    def loss(self) -> Tensor | None:
        """The loss of the whole batch, with a graph that hands out the gradients; None if no step returned one.

        Raises:
            UnsupportedError: Some micro-batches returned a loss and others none.
        """
        losses = [loss_of(output) for output in self.outputs]
        if all(loss is None for loss in losses):
            return None
        if any(loss is None for loss in losses):
            raise UnsupportedError(
                "training_step returned a loss for some micro-batches and None for others. Set "
                "micro_batching='forward', which runs it once on the whole batch."
            )
        value = weighted([loss.detach() for loss in losses if loss is not None], self._task.rows)
        found = {id(leaf): leaf for leaves in self._found for leaf in leaves}
        self._leaves = list(found.values())
        if not self._leaves:
            return value
        result: Any = _StepLoss.apply(self, value, self.engine.anchor, *self._leaves)  # type: ignore[no-untyped-call]
        whole: Tensor = result
        return whole

    def hand_out(self, gradient: Tensor) -> list[Tensor | None]:
        """The gradients, if the loss has got `gradient`."""
        totals = self.sums.totals()
        factor = float(gradient) / self._task.scale
        if abs(factor - 1.0) <= torch.finfo(gradient.dtype).eps:
            factor = 1.0  # the scale as the loss's dtype knows it
        spare(leaf for leaf in self._leaves if id(leaf) not in totals)
        result = []
        for leaf in self._leaves:
            total = totals.get(id(leaf))
            result.append(total if total is None or factor == 1.0 else total * factor)
        if not keeps_graph():
            self.sums.clear()
        return result

    def _lane(self, lane: Lane) -> None:
        try:
            self._state.run(lambda: self._step(lane))
        finally:
            lane.turned_s = None
            self._goes_to(lane, None)  # it may have failed, or have no loss
            self._forward_turns.end(lane.index)
            self._backward_turns.end(lane.index)

    def _all_forwards_done(self, lane: Lane) -> None:
        self._forwards.count_down()
        while not self._forwards.wait(_LOOK_AGAIN_S):
            self.check()  # another lane has failed, and will not come

    def _step(self, lane: Lane, *, alone: bool = False) -> None:
        index = lane.index
        if self.seed is not None and self._task.own_code_draws:
            lane.stream = Stream(self.generators.of[self.engine.root], derive(self.seed, index))
            with lane.stream.running():
                output = self._task.run(index)
        else:
            output = self._task.run(index)
        self._forward_turns.end(index)  # what the backward of a lane waits for may wait for this one
        loss = loss_of(output)
        self.outputs[index] = output
        self.sums.announce(index, lane.trace)
        self._task.turning_point.number = len(lane.trace) - 1
        if self._task.forwards_first and self._crew is not None:
            self._all_forwards_done(lane)
        if loss is not None and loss.requires_grad:
            edges, leaves, _ = walk([loss], [lane.anchor])
            share = self._task.rows[index] / sum(self._task.rows)
            seed = loss.new_full(loss.shape, share * self._task.scale)
            lane.in_backward = True
            stray: list[Tensor] = []
            added: list[Tensor] = []
            try:
                with (
                    torch.no_grad(),
                    self._task.in_backward(),
                    self._accumulated(stray, added) if alone else nullcontext(),
                ):
                    found = gradients([loss], [seed], [lane.anchor, *edges], keep_graph=False)
            except RuntimeError as error:
                if "use_reentrant=True" in str(error):  # torch's words, about a call that the user did not make
                    annotated(error, _REENTRANT)
                raise
            finally:
                lane.in_backward = False
            self.accumulates = self.accumulates or bool(stray)
            self.sums.add(OWN_CODE, index, 0, [*leaves, *stray], [*found[1:], *added])
            self._found[index] = [*leaves, *stray, *(leaf for call in lane.units for leaf in call.leaves)]
            self.outputs[index] = detached(output)
        self.sums.end(index)
        lane.drop_graph()

    @contextmanager
    def _accumulated(self, leaves: list[Tensor], found: list[Tensor]) -> Iterator[None]:
        """Within the block, what code of the backward adds to `grad` of parameters by itself ends up in these lists.

        The host clears `grad` after the step, and before the gradients are handed out.
        """
        before = [leaf.grad for leaf in self._task.leaves]
        try:
            for leaf in self._task.leaves:
                leaf.grad = None
            yield
            for leaf in self._task.leaves:
                if leaf.grad is not None:
                    leaves.append(leaf)
                    found.append(leaf.grad)
        finally:
            for leaf, gradient in zip(self._task.leaves, before, strict=True):
                leaf.grad = gradient


def _check_of(call: weakref.ref[StepCall]) -> Callable[[], None]:
    """The check of a call, without a circle: that would keep batch and gradients until Python collects garbage."""

    def check() -> None:
        alive = call()
        if alive is not None:
            alive.check()

    return check


class _StepLoss(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, call: StepCall, value: Tensor, anchor: Tensor, *leaves: Tensor) -> Tensor:
        ctx.call = call
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "the gradient of a training step in micro-batches cannot be differentiated again (create_graph=True). "
                "Set micro_batching='forward'."
            )
        return (None, None, None, *ctx.call.hand_out(gradients[0]))


def weighted(values: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """The mean of values of micro-batches, each with the weight of its rows."""
    total = sum(rows)
    result = values[0] * (rows[0] / total)
    for value, count in zip(values[1:], rows[1:], strict=True):
        result = result + value * (count / total)
    return result


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned.

    Raises:
        UnsupportedError: It is not a tensor with one element.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnsupportedError(
            f"training_step returned {type(loss).__name__} as loss; in micro-batches it has to be a tensor with one "
            "element, or None"
        )
    return loss


def detached(output: Any) -> Any:
    """What a training step returned, without graphs."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        return {key: detached(value) for key, value in output.items()}
    return output
