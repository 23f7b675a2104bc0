"""A call of a placed module from a lane: a task of the device's worker, with the autograd graph cut around it.

Three graphs meet here. The lane's graph holds two nodes for each call; the unit's graph, from detached inputs to
outputs, is known to the worker only::

    lane      inputs, anchor ──> Enter ──> phony (CPU) ──> Exit ──> outputs
    worker    detached inputs, parameters ──> ... ──> outputs

In the backward, Exit only submits a task, because it may run in autograd's own thread of an accelerator, which other
lanes need too. Enter waits for the task: its gradient is that of a CPU scalar, so it runs in the lane's own thread.
One node that submits and waits deadlocks as soon as outputs are on an accelerator. Where they are on the CPU, its
backward runs in the lane's own thread, and one node, Both, does the work of two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_hetero.runtime.containers import are_unchanged, contents
from lightning_hetero.runtime.engine.lanes import Lane
from lightning_hetero.runtime.engine.leaves import gradients, walk
from lightning_hetero.runtime.engine.state import (
    ThreadState,
    is_plain,
    records_now,
    run_here,
    saves_otherwise,
    stays_in_its_thread,
)
from lightning_hetero.runtime.engine.streams import Stream, derive
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.worker import Task, Worker
from lightning_hetero.runtime.transfer import version_of

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.call import Call

_NO_GRADIENT = torch.zeros((), device="cpu")  # what every phony gets; nobody looks at it
_NOTHING = nullcontext()


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

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The ordinary call."""


class UnitCall:
    """One call of one unit in one lane, from forward to backward.

    Attributes:
        unit: The unit.
        number: Index of the call in its lane.
        leaves: The leaves that the unit's graph depends on, inputs aside; the originals of those that are copies.
        inner: Nodes of the unit's graph, where they are checked for capture; None otherwise.
    """

    __slots__ = ("_edges", "_inputs", "_lane", "_outputs", "_result", "inner", "leaves", "number", "unit")

    def __init__(self, call: Call, lane: Lane, unit: Unit, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._lane = weakref.ref(lane)
        self.unit = unit
        self.number = len(lane.trace) - 1
        self._inputs: list[Tensor] | None = inputs
        self._outputs: list[Tensor] | None = outputs
        self._edges, leaves, nodes = walk(outputs, known=inputs)
        self.leaves = unit.homes(leaves)
        self.inner: set[Node] | None = nodes if call.checks_capture else None
        self._result: Callable[[], Any] | None = None
        lane.units.append(self)

    @property
    def lane(self) -> Lane:
        """The lane. See `Lane.call` for why the reference is weak."""
        lane = self._lane()
        if lane is None:
            raise RuntimeError(_escaped(self.unit.name, "a module"))
        return lane

    def detached_outputs(self) -> tuple[Tensor, ...]:
        """The outputs for the lane's graph."""
        assert self._outputs is not None
        return tuple(output.detach() for output in self._outputs)

    def submit_backward(self, given: tuple[Tensor | None, ...]) -> None:
        """Get the backward of the unit's graph on its way: to the thread of the device, or this one, in `wait`."""
        lane = self.lane
        call = lane.call
        if not lane.in_backward:
            raise RuntimeError(_escaped(self.unit.name, call.name))
        if torch.is_grad_enabled():
            raise CannotCutError("a gradient inside of it is differentiated again (create_graph=True)")
        worker = self.unit.worker
        place = call.place("B", self.unit, lane)
        task = Task("B", self.unit.name, self.unit.stage, lane.index, partial(self._backward, lane, given))
        if worker.takes_help and is_plain():
            self._result = partial(worker.help, place, call.number, task)
        else:
            self._result = worker.submit(place, call.number, task).get

    def wait(self) -> Sequence[Tensor | None]:
        """Gradients of the inputs."""
        result, self._result = self._result, None  # an error in it holds frames, and they this graph
        if result is None:
            raise RuntimeError(f"{self.unit.name}: its backward was asked for before that of its outputs")
        found: Sequence[Tensor | None] = result()
        return found

    def _backward(self, lane: Lane, given: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
        call = lane.call
        call.check()
        outputs, inputs = self._outputs, self._inputs
        if outputs is None or inputs is None:
            raise RuntimeError("backward through a cut module a second time, without retain_graph=True the first time")
        pairs = [(y, g) for y, g in zip(outputs, given, strict=True) if g is not None]
        if not pairs:
            return (None,) * len(inputs)
        reached, theirs = zip(*pairs, strict=True)
        with _drawing(call, lane, self.unit, None):
            found = gradients(reached, theirs, [*inputs, *self._edges], keep_graph=call.keeps_graph)
        count = len(inputs)
        call.sums.add(self.unit.number, lane.index, self.number, self.leaves, found[count:])
        if not call.keeps_graph:
            self._inputs = self._outputs = None
        return found[:count]


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
        return _NO_GRADIENT.detach()  # a new tensor, at a quarter of the price of torch.zeros

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        return (None, None, *ctx.call.wait())


class Exit(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, call: UnitCall, phony: Tensor) -> Any:  # noqa: D102
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.detached_outputs()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        ctx.call.submit_backward(gradients)
        return None, _NO_GRADIENT


class Both(torch.autograd.Function):
    """Enter and Exit in one, for outputs on the CPU; see the module's text."""

    @staticmethod
    def forward(ctx: Any, call: UnitCall, anchor: Tensor, *inputs: Tensor) -> Any:  # noqa: D102
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.detached_outputs()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        ctx.call.submit_backward(gradients)
        return (None, None, *ctx.call.wait())


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
    call.check()
    if stays_in_its_thread() is not None:
        return unit.run(*args, **kwargs)
    unit = call.replica(lane, unit)
    given = Tree((args, kwargs) if kwargs else args)
    records = records_now()
    if given.opaque is not None:
        raise CannotCutError(f"{unit.name} is called with a {type(given.opaque).__name__}, which may hold tensors")
    lane_inputs: list[Tensor] = []
    inputs: list[Tensor] = []
    tensors = given.tensors
    if records:
        tensors = _detached(tensors, lane_inputs, inputs)
    if unit.draws and saves_otherwise():
        raise CannotCutError(f"{unit.name} draws random numbers under activation checkpointing from outside")
    versions = [version_of(tensor) for tensor in given.tensors]
    passed, named = given.build(tensors) if kwargs else (given.build(tensors), kwargs)
    number = len(lane.trace)
    lane.trace.append(unit.number)
    containers = contents((passed, *named.values())) if given.has_containers else []

    def work() -> Any:
        call.check()
        with _drawing(call, lane, unit, number):
            return unit.run(*passed, **named)

    worker = unit.worker
    helps = worker.takes_help
    run = partial(run_here if helps else ThreadState(call.device_types).run, work)
    task = Task("F", unit.name, unit.stage, lane.index, run)
    place = call.place("F", unit, lane)
    with lane.stream.paused() if lane.stream is not None else _NOTHING, call.in_order(lane, unit):
        output = worker.help(place, call.number, task) if helps else worker.submit(place, call.number, task).get()
    if versions != [version_of(tensor) for tensor in given.tensors]:
        raise CannotCutError(f"{unit.name} changes its input in place")
    if containers and not are_unchanged(containers):
        raise CannotCutError(f"{unit.name} writes into a container that it is given")
    return _attach(call, lane, unit, output, given.tensors, tensors, lane_inputs, inputs) if records else output


def _detached(tensors: list[Tensor], lane_inputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The tensors, those with a graph replaced by leaves. A tensor that is passed twice arrives as one."""
    new_of: dict[int, Tensor] = {}
    result = []
    for tensor in tensors:
        if not tensor.requires_grad:
            result.append(tensor)
            continue
        if id(tensor) not in new_of:
            new_of[id(tensor)] = tensor.detach().requires_grad_()
            lane_inputs.append(tensor)
            inputs.append(new_of[id(tensor)])
        result.append(new_of[id(tensor)])
    return result


def _attach(
    call: Call,
    lane: Lane,
    unit: Unit,
    output: Any,
    given: list[Tensor],
    used: list[Tensor],
    lane_inputs: list[Tensor],
    inputs: list[Tensor],
) -> Any:
    """The output of a unit as part of the lane's graph."""
    found = Tree(output)
    if found.opaque is not None:
        raise CannotCutError(f"{unit.name} returns a {type(found.opaque).__name__}, which may hold tensors")
    given_of = {id(new): old for old, new in zip(given, used, strict=True)}
    results: list[Tensor] = []
    traced: list[Tensor] = []
    places: list[int] = []
    for tensor in found.tensors:
        results.append(given_of.get(id(tensor), tensor))
        if tensor.requires_grad and id(tensor) not in given_of:
            places.append(len(results) - 1)
            # A leaf (a weight that is returned) has no node to begin a backward at.
            traced.append(tensor if tensor.grad_fn is not None else tensor.view_as(tensor))
    if traced:
        made = UnitCall(call, lane, unit, inputs, traced)
        if all(tensor.is_cpu for tensor in traced):
            outputs = _both(made, lane.anchor, *lane_inputs)
        else:
            outputs = _exit(made, _enter(made, lane.anchor, *lane_inputs))
        for place, tensor in zip(places, outputs, strict=True):
            results[place] = tensor
    return found.build(results)


def _drawing(call: Call, lane: Lane, unit: Unit, number: int | None) -> AbstractContextManager[None]:
    """The generator of the unit's device, if the unit draws random numbers; set for call `number` of the lane."""
    if not unit.draws or call.seed is None:
        return _NOTHING
    seed = None if number is None else derive(call.seed, lane.index, 1 + number)
    return Stream(call.generators.of[unit.worker.torch_device], seed).running()
