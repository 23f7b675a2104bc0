"""A call of a placed module from a lane: a task of the device's worker, with the autograd graph cut around it.

Three graphs meet here. The lane's graph holds two nodes for each call; the unit's graph, from detached inputs to
outputs, is known to the worker only::

    lane      inputs, anchor ──> Enter ──> phony (CPU) ──> Exit ──> outputs
    worker    detached inputs, parameters ──> ... ──> outputs

In the backward, Exit only submits a task, because it may run in autograd's own thread of an accelerator, which other
lanes need too. Enter waits for the task: its gradient is that of a CPU scalar, so it runs in the lane's own thread.
One node that submits and waits deadlocks as soon as outputs are on an accelerator. Where they are on the CPU, its
backward runs in the lane's own thread, and one node, Both, does the work of two.

Tensors change their device between these graphs, outside of autograd: inputs before the unit's graph begins, outputs
behind its end, gradients the other way. So it is known who waits for a copy, and no device waits for another.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.borders import enters_by, leaves_by
from lightning_hetero.runtime.copies import Arriving, Mark, mark, send
from lightning_hetero.runtime.engine.at_once import adding_at_once
from lightning_hetero.runtime.engine.fresh import Fresh
from lightning_hetero.runtime.engine.inputs import Inputs
from lightning_hetero.runtime.engine.lanes import Lane
from lightning_hetero.runtime.engine.leaves import gradients, walk
from lightning_hetero.runtime.engine.state import (
    in_this_context,
    is_plain,
    saves_otherwise,
    stays_in_its_thread,
)
from lightning_hetero.runtime.engine.streams import Stream, derive
from lightning_hetero.runtime.engine.tree import Tree, with_attributes
from lightning_hetero.runtime.engine.unreached import leave_out
from lightning_hetero.runtime.engine.worker import Cancelled, Task, Worker
from lightning_hetero.runtime.frames import HERE, Frame
from lightning_hetero.runtime.transfer import map_tensors, to_device, version_of

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.call import Call

_detach = methodcaller("detach")
_OURS = frozenset({"BothBackward", "ExitBackward"})  # nodes of calls of units
_NO_KWARGS: dict[str, Any] = {}
NO_GRADIENT = torch.zeros((), device="cpu")  # what every phony gets; nobody looks at it


class CannotCutError(BaseException):
    """What runs in a lane cannot be cut without a change of results. The region runs whole instead.

    Not an Exception: user code that tries one way and falls back to another must not swallow it.
    """


class Unit(Protocol):
    """A placed module, or several that follow each other on one device."""

    name: str
    number: int
    worker: Worker
    stage: int
    draws: bool

    @property
    def runs_again(self) -> bool:
        """Whether its backward runs some of its forward again, by code of its own."""

    @property
    def replicas(self) -> Sequence[Unit]:
        """The unit on other devices."""

    @property
    def shares(self) -> Sequence[float]:
        """How much of a batch each of its devices gets, its own first; none if it has no replicas."""

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The modules that it runs."""

    def homes(self, leaves: list[Tensor]) -> list[Tensor]:
        """The parameters that leaves of the unit's graph stand for."""

    @property
    def has_state(self) -> bool:
        """Whether its forward may change buffers, so that the order of micro-batches matters."""

    @property
    def stateful(self) -> Sequence[nn.Module]:
        """The modules in it whose buffers its forward may change."""

    @property
    def has_large_weights(self) -> bool:
        """Whether it is on the CPU with weights that are large; see `at_once`."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The ordinary call."""


class UnitCall:
    """One call of one unit in one lane, from forward to backward.

    Attributes:
        unit: The unit.
        number: Index of the call in its lane.
        leaves: The leaves that the unit's graph depends on, inputs aside; the originals of those that are copies.
        inner: Nodes of the unit's graph, until they have been checked for capture; None otherwise.
    """

    __slots__ = (
        "_edges", "_handed", "_homes", "_inputs", "_lane", "_outputs", "_places", "_result", "_together",
        "inner", "leaves", "number", "unit",
    )  # fmt: skip

    def __init__(
        self, call: Call, lane: Lane, unit: Unit, inputs: Inputs, outputs: list[Tensor], handed: list[Tensor]
    ) -> None:
        self._lane = weakref.ref(lane)
        self.unit = unit
        self.number = len(lane.trace) - 1
        self._inputs: list[Tensor] | None = inputs.leaves
        self._outputs: list[Tensor] | None = outputs
        self._handed: Sequence[Tensor] = handed
        # Where gradients have to be brought; None if they come to the right device by themselves.
        self._homes = inputs.homes
        self._places = None if handed is outputs else _places(outputs, handed)
        self._edges, leaves, nodes = walk(outputs, known=inputs.leaves)
        if unit.runs_again and any(type(node).__name__ in _OURS for node in nodes):
            # Its backward is alone with the generators, and would wait for that of the other part.
            raise CannotCutError(f"{unit.name} calls another part, and runs again under activation checkpointing")
        self.leaves = unit.homes(leaves)
        self.inner: set[Node] | None = nodes if call.checks_capture else None
        self._result: Callable[[], Any] | None = None
        self._together: Sequence[tuple[Tensor, int]] = ()
        lane.units.append(self)

    @property
    def lane(self) -> Lane:
        """The lane. See `Lane.call` for why the reference is weak."""
        lane = self._lane()
        if lane is None:
            raise RuntimeError(_escaped(self.unit.name, "a module"))
        return lane

    def take_outputs(self) -> tuple[Tensor, ...]:
        """The outputs for the lane's graph, once: this may not keep them, since their graph keeps this."""
        handed, self._handed = self._handed, ()
        return tuple(map(_detach, handed))

    def note_memory(self, tensors: Sequence[Tensor], in_lane: Sequence[Tensor]) -> None:
        """Note which tensors share memory: those of the unit do not tell the lane's that one is a view of another.

        Args:
            tensors: Tensors of the unit.
            in_lane: What stands for them in the lane.
        """
        count = Counter(map(_memory, tensors))
        self._together = [
            (tensor.detach(), version_of(tensor))  # without its graph, which keeps this
            for known, tensor in zip(tensors, in_lane, strict=True)
            if count[_memory(known)] > 1
        ]

    def check_memory(self) -> None:
        """See to it that the lane has not written to memory that tensors share.

        Raises:
            CannotCutError: It has: the others have new values too, or should have, and their graphs do not know.
        """
        if not self._together:
            return
        together, self._together = self._together, ()
        if any(version_of(tensor) != version for tensor, version in together):
            raise CannotCutError(f"a tensor that shares memory with an output of {self.unit.name} is changed in place")

    def submit_backward(self, given: tuple[Tensor | None, ...]) -> None:
        """Get the backward of the unit's graph on its way: to the thread of the device, or this one, in `wait`."""
        lane = self.lane
        call = lane.call
        if not lane.in_backward:
            raise RuntimeError(_escaped(self.unit.name, call.name))
        if self._together:
            self.check_memory()
        if torch.is_grad_enabled():
            raise CannotCutError("a gradient inside of it is differentiated again (create_graph=True)")
        worker = self.unit.worker
        place = call.place("B", self.unit, lane)
        arriving = None
        if self._places is not None:
            known = lane.fresh_gradients
            ready = None if known is None else known.ready([g for g in given if g is not None])
            arriving, given = send(given, self._places, ready), ()  # which may go as soon as they are copied
        work = partial(self._backward, call, lane, given, arriving)
        task = Task("B", self.unit.name, self.unit.stage, lane.index, work)
        call.arrives(lane, worker)
        may_begin = call.turn_of(lane, self.unit)
        if worker.takes_help and is_plain():
            self._result = partial(worker.help, place, call.number, task, may_begin, in_this_context)
        else:
            if (
                worker.torch_device.type == "cpu"
            ):  # whose backward is in the thread of the user, elsewhere autograd has its own
                task = task._replace(run=in_this_context(task.run))
            self._result = worker.submit(place, call.number, task, may_begin).get

    def wait(self) -> Sequence[Tensor | None]:
        """Gradients of the inputs."""
        result, self._result = self._result, None  # an error in it holds frames, and they this graph
        if result is None:
            raise RuntimeError(f"{self.unit.name}: its backward was asked for before that of its outputs")
        found, made_at = result()
        gradients: Sequence[Tensor | None] = found if self._homes is None else send(found, self._homes, made_at).take()
        return gradients

    def _backward(
        self, call: Call, lane: Lane, given: Sequence[Tensor | None], arriving: Arriving | None
    ) -> tuple[Sequence[Tensor | None], Mark | None]:
        if call.has_failed:
            raise Cancelled
        outputs, inputs = self._outputs, self._inputs
        if outputs is None or inputs is None:
            raise RuntimeError("backward through a cut module a second time, without retain_graph=True the first time")
        reached, theirs = [], []
        for output, gradient in zip(outputs, given if arriving is None else arriving.take(), strict=True):
            if gradient is not None:
                reached.append(output)
                theirs.append(gradient)
        count = len(inputs)
        if not reached:
            return (None,) * count, None
        into = call.sums.sum_of(self.unit.number, lane.index) if self.unit.has_large_weights else None
        if into is None:
            found = self._gradients(call, reached, theirs)
            of_leaves = found[count:]
        else:
            with adding_at_once(into, self._edges, self.leaves, reached) as added:
                found = self._gradients(call, reached, theirs)
            left = zip(found[count:], added, strict=True)
            of_leaves = [None if hook is not None and hook.is_done else gradient for gradient, hook in left]
        call.sums.add(self.unit.number, lane.index, self.number, self.leaves, of_leaves)
        if not call.keeps_graph:
            self._inputs = self._outputs = None
        return found[:count], None if self._homes is None else mark(self.unit.worker.torch_device)

    def _gradients(self, call: Call, reached: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Those of the inputs, then of the leaves."""
        assert self._inputs is not None
        wanted: list[Tensor | GradientEdge] = [*self._inputs, *self._edges]
        if self.unit.runs_again and (call.seed is not None or call.is_step):
            # `torch.utils.checkpoint` sets the generator of the CPU and puts it back, while others may draw.
            with call.generators.alone(self.unit.worker.torch_device):
                return gradients(reached, given, wanted, keep_graph=call.keeps_graph)
        if call.seed is not None and self.unit.draws:
            with _drawing(call, self.unit, None):
                return gradients(reached, given, wanted, keep_graph=call.keeps_graph)
        return gradients(reached, given, wanted, keep_graph=call.keeps_graph)


def _places(outputs: Sequence[Tensor], handed: Sequence[Tensor]) -> list[torch.device] | None:
    places = [output.device for output in outputs]
    return None if places == [tensor.device for tensor in handed] else places


def _memory(tensor: Tensor) -> int:
    """Says which piece of memory a tensor lies in."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _escaped(unit: str, region: str) -> str:
    return (
        f"{unit}: a tensor from inside {region}, which was cut into micro-batches, is part of a graph outside of it. "
        "Set micro_batches=1, or return the tensor from the module."
    )


class Enter(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, call: UnitCall, anchor: Tensor, *inputs: Tensor) -> Tensor:  # noqa: D102
        ctx.call = call
        return NO_GRADIENT.detach()  # a new tensor, at a quarter of the price of torch.zeros

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        found = ctx.call.wait()
        leave_out(ctx.next_functions[1:], found)
        return (None, None, *found)


class Exit(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, call: UnitCall, phony: Tensor) -> Any:  # noqa: D102
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.take_outputs()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        ctx.call.submit_backward(gradients)
        return None, NO_GRADIENT


class Both(torch.autograd.Function):
    """Enter and Exit in one, for outputs on the CPU; see the module's text."""

    @staticmethod
    def forward(ctx: Any, call: UnitCall, anchor: Tensor, *inputs: Tensor) -> Any:  # noqa: D102
        ctx.call = call
        ctx.materialize_grads = False  # what `set_materialize_grads` does
        return call.take_outputs()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        call: UnitCall = ctx.call
        call.submit_backward(gradients)
        found = call.wait()
        leave_out(ctx.next_functions[1:], found)
        return (None, None, *found)


# `Function.apply` itself would look for torch.func first: a third of its time, for what `call_unit` has ruled out.
_enter: Any = super(torch.autograd.Function, Enter).apply
_exit: Any = super(torch.autograd.Function, Exit).apply
_both: Any = super(torch.autograd.Function, Both).apply


def call_unit(lane: Lane, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a unit from a lane.

    Raises:
        CannotCutError: The call cannot be cut.
        Cancelled: Another lane has failed.
    """
    call = lane.call
    if call.has_failed:
        raise Cancelled
    if stays_in_its_thread() is not None:
        return unit.run(*args, **kwargs)
    if unit.replicas:
        unit = call.replica(lane, unit)
    given = Tree((args, kwargs) if kwargs else args)
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    confinement = call.engine.confinement
    if confinement is not None:
        confinement.check(unit.name, unit.worker.device, (args, kwargs))
    if given.opaque is not None:
        raise CannotCutError(f"{unit.name} is called with a {type(given.opaque).__name__}, which may hold tensors")
    if unit.draws and saves_otherwise():
        raise CannotCutError(f"{unit.name} draws random numbers under activation checkpointing from outside")
    lane.trace.append(unit.number)
    if lane.stream is None:
        return _run(call, lane, unit, given, records, bool(kwargs))
    with lane.stream.paused():
        return _run(call, lane, unit, given, records, bool(kwargs))


def _run(call: Call, lane: Lane, unit: Unit, given: Tree, records: bool, has_kwargs: bool) -> Any:
    """Let the unit's worker do it, and wait."""
    worker, parts = unit.worker, unit.parts
    device = worker.torch_device
    in_chain = bool(HERE.frames) and HERE.frames[-1].chain
    fresh = lane.fresh if lane.passes_on else None
    lane.fresh, lane.passes_on = None, False
    wanted = device if enters_by(parts[0]) == device else None
    inputs = Inputs(given, wanted, records=records, fresh=fresh)
    home = None if in_chain or device == call.engine.root else leaves_by(parts[-1])
    number = len(lane.trace) - 1

    def work() -> tuple[Any, Mark | None]:
        if call.has_failed:
            raise Cancelled
        arrived = inputs.arrive()
        args, kwargs = arrived if has_kwargs else (arrived, _NO_KWARGS)
        if home is not None:
            frames.push(Frame(0, home, chain=True))  # outputs leave the device behind the end of the unit's graph
        if unit.draws and call.seed is not None:
            with _drawing(call, unit, derive(call.seed, lane.index, 1 + number)):
                output = unit.run(*args, **kwargs)
        else:
            output = unit.run(*args, **kwargs)
        return output, mark(device)

    task = Task("F", unit.name, unit.stage, lane.index, work, call.when_ended(unit, number, lane))
    place = call.place("F", unit, lane)
    order = call.in_order(lane, unit)
    call.arrives(lane, worker)
    if order is None:
        output, made_at = _done(call, worker, place, task)
    else:
        with order:
            output, made_at = _done(call, worker, place, task)
    if (changed := inputs.changed()) is not None:
        raise CannotCutError(f"{unit.name} {changed}")
    if records:
        output = _attach(call, lane, unit, output, inputs, home, made_at)
    elif home is not None:
        output = _brought(output, inputs, home, made_at)
    if made_at is not None and in_chain:
        lane.fresh = Fresh(made_at, Tree(output).tensors)
    return output


def _done(call: Call, worker: Worker, place: int, task: Task) -> Any:
    """The result of a forward."""
    if not worker.takes_help:
        return worker.submit(place, call.number, task._replace(run=call.carried(task.run))).get()
    stack = HERE.frames
    depth = len(stack)
    try:
        return worker.help(place, call.number, task, None, call.carried)
    finally:
        del stack[depth:]


def _attach(
    call: Call, lane: Lane, unit: Unit, output: Any, inputs: Inputs, home: torch.device | None, made_at: Mark | None
) -> Any:
    """The output of a unit as part of the lane's graph; on `home`, or where it is."""
    found = Tree(output)
    if found.opaque is not None:
        raise CannotCutError(f"{unit.name} returns a {type(found.opaque).__name__}, which may hold tensors")
    given_of = inputs.given_of
    own: list[Tensor] = []
    traced: list[Tensor] = []
    places: list[int] = []
    for tensor in found.tensors:
        if id(tensor) in given_of:
            continue
        if tensor.requires_grad:
            # A leaf (a weight that is returned) has no node to begin a backward at.
            traced.append(tensor if tensor.grad_fn is not None else tensor.view_as(tensor))
            places.append(len(own))
        own.append(tensor)
    results = own if home is None else _sent(own, home, made_at)
    if places:
        handed = traced if home is None else [results[place] for place in places]
        made = UnitCall(call, lane, unit, inputs, traced, handed)
        on_cpu = True
        for tensor in handed:
            on_cpu = on_cpu and tensor.is_cpu
        if on_cpu:
            outputs = _both(made, lane.anchor, *inputs.traced)
        else:
            outputs = _exit(made, _enter(made, lane.anchor, *inputs.traced))
        results = list(results)
        for place, tensor in zip(places, outputs, strict=True):
            results[place] = tensor
        if any(map(Tensor._is_view, own)):
            # What needs no gradient may share its values, unless it was copied.
            kept = [place for place, tensor in enumerate(own) if tensor.requires_grad or home is not None]
            made.note_memory(
                [*[own[place] for place in kept], *inputs.leaves], [*[results[place] for place in kept], *inputs.traced]
            )
    if len(own) < len(found.tensors):
        rest = iter(results)
        results = [
            _handed_through(given_of[id(tensor)], home) if id(tensor) in given_of else next(rest)
            for tensor in found.tensors
        ]
    return found.build(results)


def _brought(output: Any, inputs: Inputs, home: torch.device, made_at: Mark | None) -> Any:
    """The output of a unit, on `home`, if autograd does not record."""
    given_of = inputs.given_of
    own = [tensor for tensor in Tree(output).tensors if id(tensor) not in given_of]
    new_of = {id(tensor): new for tensor, new in zip(own, _sent(own, home, made_at), strict=True)}

    def visit(tensor: Tensor) -> Tensor:
        new = new_of.get(id(tensor))
        return with_attributes(_handed_through(given_of.get(id(tensor), tensor), home) if new is None else new, tensor)

    return map_tensors(output, visit, home)


def _sent(tensors: Sequence[Tensor], home: torch.device, made_at: Mark | None) -> list[Tensor]:
    """The tensors on `home`, without graphs, for this thread to use."""
    plain = [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]
    return [tensor for tensor in send(plain, [home] * len(plain), made_at).take() if tensor is not None]


def _handed_through(given: Tensor, home: torch.device | None) -> Tensor:
    """An input that is handed through comes back as the very tensor that was given, if it is where it should be."""
    return given if home is None else to_device(given, home)


def _drawing(call: Call, unit: Unit, seed: int | None) -> AbstractContextManager[None]:
    """The generator of the unit's device, for the unit alone; see `Stream`."""
    return Stream(call.generators.of[unit.worker.torch_device], seed).running()
