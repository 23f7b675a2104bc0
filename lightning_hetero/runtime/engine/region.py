"""One pipelined call of a region: its rows go through lanes, forward and backward, and are joined again.

To user code the call is one module call on the whole batch. Two autograd nodes stand for it::

    inputs, parameters, anchor ──> RegionEnter ──> phony (CPU) ──> RegionExit ──> joined outputs ──> loss

The backward of RegionExit only starts the lanes, because it may run in autograd's thread of an accelerator. That of
RegionEnter gets a CPU scalar, so it runs in the thread that called `backward()`, waits for all lanes, also after an
error, and *returns* the gradients of parameters. Lanes never write to `.grad`: hooks of a parameter fire once per
backward, and `autograd.grad` leaves `.grad` alone.

With rematerialization (Chen et al., "Training deep nets with sublinear memory cost", 2016) the forward keeps no
graph; the backward of a lane runs its forward once more, and only a few lanes are under way at once.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_hetero.runtime.containers import are_unchanged, contents
from lightning_hetero.runtime.copies import Mark, mark
from lightning_hetero.runtime.engine.batch import Join, joined, offsets
from lightning_hetero.runtime.engine.call import Call
from lightning_hetero.runtime.engine.cut import NO_GRADIENT, CannotCutError
from lightning_hetero.runtime.engine.fresh import Fresh
from lightning_hetero.runtime.engine.lanes import Lane
from lightning_hetero.runtime.engine.leaves import OWN_CODE, OrderedSums, gradients, walk
from lightning_hetero.runtime.engine.region_task import RegionTask
from lightning_hetero.runtime.engine.silence import spare
from lightning_hetero.runtime.engine.state import keeps_graph
from lightning_hetero.runtime.engine.streams import Stream, derive
from lightning_hetero.runtime.engine.tree import Tree, with_attributes
from lightning_hetero.runtime.engine.unreached import leave_out
from lightning_hetero.runtime.engine.views import View, views_of
from lightning_hetero.runtime.transfer import map_tensors, once, to_device, versions_of

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.engine import Engine


class RegionCall(Call):
    """One call of a region, from its forward to the last of its backwards.

    Args:
        engine: Workers, lanes, generators.
        task: What is to be done.
    """

    def __init__(self, engine: Engine, task: RegionTask) -> None:
        super().__init__(
            engine,
            number=task.number,
            name=task.name,
            rows=task.rows,
            seed=task.seed,
            checks_capture=task.rematerialized is None,
        )
        self.task = task
        self.thread = threading.get_ident()
        self.backward_runs = False
        self._offsets = offsets(task.rows)
        # Inputs that need a gradient, by place: cut ones get theirs joined, whole ones theirs added up.
        self._needed = [place for place, t in enumerate(task.given.tensors) if self._state.records and t.requires_grad]
        # What a second run of the forward needs as it is now.
        self._needed_again = [*task.given.tensors, *(() if task.again is None else task.again.unchanged)]
        self._versions = versions_of(self._needed_again)
        self._parameters: list[Tensor] = list(task.rematerialized or ())
        self._traced: list[int] = []  # places of outputs that have a graph of their own
        self._views: dict[int, View] = {}  # of those that are parts of other outputs
        self.columns: list[list[Tensor]] = []
        # What lanes were given, by their index, until outputs are joined.
        self._passed: dict[int, Sequence[Tensor]] = {}
        self._ready: Mark | None = None  # when lanes may read what they are given; that of their backward likewise
        self._spent = False
        self._differentiated: tuple[Tensor | None, ...] | None = None
        self._draws_again = False
        self._during_backward = ExitStack()

    # Forward

    def forward(self) -> Any:
        """The output of the whole batch.

        Raises:
            CannotCutError: Something in the lanes cannot be cut; nothing has happened, the region may run whole.
        """
        outputs: dict[int, Tree] = {}
        records = self._state.records and self.task.rematerialized is None

        def work(lane: Lane) -> None:
            outputs[lane.index] = self._state.run(lambda: self._lane_forward(lane, records))

        versions = versions_of(self.task.buffers)
        with self.task.deferred.collecting():
            self.engine.interceptions.renew_replicas()
            self._ready = mark(self.engine.root)
            self._start(work, self.engine.threads.lanes_at_once)
            self._finish()
            if versions != versions_of(self.task.buffers) or self.engine.interceptions.replicas_changed_buffers:
                raise RuntimeError(
                    f"{self.name} has changed a buffer for each of its micro-batches, which it did not do in its "
                    "trial. The buffer is not what it would be on one device. Set micro_batches=1."
                )
        return self._join([outputs[lane.index] for lane in self._lanes])

    def _lane_forward(self, lane: Lane, records: bool) -> Tree:
        """The output of one micro-batch."""
        lane.begin()
        task = self.task
        start, stop = self._offsets[lane.index], self._offsets[lane.index + 1]
        tensors = task.cut.take([tensor.detach() for tensor in task.given.tensors], start, stop)
        if records:
            for place in self._needed:
                tensors[place] = tensors[place].requires_grad_()
                lane.inputs.append(tensors[place])
        if self._ready is not None:
            lane.given = Fresh(self._ready, tensors)
        self._passed[lane.index] = tensors
        args, kwargs = task.given.build(tensors)
        if records and task.rematerialized is not None and task.again is not None:
            args, kwargs = task.again.frozen.of((args, kwargs))
        containers = contents((args, *kwargs.values())) if task.given.has_containers else []
        with torch.set_grad_enabled(records):
            if self.seed is None or not task.own_code_draws:
                output = task.forward(*args, **kwargs)
            else:
                lane.stream = Stream(self.generators.of[self.engine.root], derive(self.seed, lane.index))
                with lane.stream.running():
                    output = task.forward(*args, **kwargs)
            if not are_unchanged(containers):
                raise CannotCutError("it writes into a container that it is given")
            for unit_call in lane.units:
                unit_call.check_memory()
            # In a chain, what the last part returns stays where it is, and that need not be one device for all lanes.
            found = Tree(_moved(output, self.engine.root) if self.engine.has_replicas else output)
        if records:
            self._look_at_graph(lane, found.tensors)  # here, while other lanes may be at work
        return found

    def _join(self, outputs: Sequence[Tree]) -> Any:
        join = Join(outputs, self.task.rows)
        again = self.task.rematerialized is not None
        given = self.task.given.tensors
        handed_through = self._handed_through(join.columns)
        has_graph = [
            self._state.records
            and (place in (self.task.traced or ()) if again else any(part.requires_grad for part in column))
            for place, column in enumerate(join.columns)
        ]
        self._views = views_of(self.task.views, join.columns, has_graph) if self.task.views else {}
        if any(view.base in handed_through for view in self._views.values()):
            raise CannotCutError("its outputs share memory with its inputs")
        self._traced = [
            place
            for place in range(len(join.columns))
            if has_graph[place] and place not in handed_through and place not in self._views
        ]
        results = [
            given[handed_through[place]]
            if place in handed_through
            else (column[0] if place in self._traced or place in self._views else joined(column))
            for place, column in enumerate(join.columns)
        ]
        if self._traced:
            self.columns = [join.columns[place] for place in self._traced]
            if not again:
                for lane in self._lanes:
                    lane.outputs = [column[lane.index] for column in self.columns]
                self._find_parameters()
            inputs = [given[place] for place in self._needed]
            phony: Any = _enter(self, self.engine.anchor, *inputs, *self._parameters)
            whole = _exit(self, phony)
            self.columns = []
            for place, tensor in zip(self._traced, whole, strict=True):
                results[place] = tensor
            for place in set(self.task.upstream).intersection(self._traced):
                for method in ("register_hook", "retain_grad"):
                    setattr(results[place], method, partial(_refuse_hook, self.name))
        for place, view in self._views.items():
            results[place] = view.of(results[view.base])
        return join.build(results)

    def _handed_through(self, columns: Sequence[Sequence[Tensor]]) -> dict[int, int]:
        """Places of outputs that are inputs, with the places of these: user code gets back the tensor that it gave."""
        place_of = [
            {id(tensor): place for place, tensor in enumerate(self._passed[lane.index])} for lane in self._lanes
        ]
        self._passed = {}
        found: dict[int, int] = {}
        for output, column in enumerate(columns):
            places = {known.get(id(part)) for known, part in zip(place_of, column, strict=True)}
            place = places.pop()
            if place is not None and not places:
                found[output] = place
        return found

    def _look_at_graph(self, lane: Lane, outputs: Sequence[Tensor]) -> None:
        """Look at the graph of a lane."""
        lane.edges, lane.leaves, nodes = walk(outputs, [lane.anchor, *lane.inputs])
        if not self.checks_capture:
            return
        lane.nodes = nodes.union(*[call.inner or () for call in lane.units])
        if "CheckpointFunctionBackward" in [kind.__name__ for kind in set(map(type, lane.nodes))]:
            raise CannotCutError("it uses checkpoint(use_reentrant=True), which torch refuses here")
        for call in lane.units:
            call.inner = None  # they would keep the unit's inputs until the whole lane's backward has ended

    def _find_parameters(self) -> None:
        """Find the leaves that the lanes' graphs depend on."""
        found: dict[int, Tensor] = {}
        seen: set[Node] = set()
        for lane in self._lanes:
            for leaves in [lane.leaves, *[call.leaves for call in lane.units]]:
                found.update(zip(map(id, leaves), leaves, strict=True))
            # A graph that several lanes share comes from outside: a tensor that is no input of the region.
            if not seen.isdisjoint(lane.nodes):
                raise CannotCutError("it uses a tensor with a graph that is not one of its inputs")
            seen |= lane.nodes
            lane.nodes = set()
        self._parameters = list(found.values())

    # Backward

    def start_backward(self, given: tuple[Tensor | None, ...]) -> None:
        """Start the lanes' backward; called in whatever thread autograd chose.

        Args:
            given: Gradient of each joined output that has a graph; None where the loss does not depend on it.
        """
        if torch.is_grad_enabled():  # create_graph=True: the result must be differentiable itself
            self._differentiated = given
            return
        if self._spent:
            raise RuntimeError(f"backward through {self.name} a second time, without retain_graph=True the first time")
        if self.backward_runs:
            raise RuntimeError(f"the backward of {self.name} is running already")
        again = self.task.rematerialized is not None
        if again:
            self._during_backward.enter_context(self._again())
        # Outputs that this loss does not use may be part of another one.
        keep = keeps_graph() or any(gradient is None for gradient in given)
        self._spent = not keep
        self.keeps_graph = keep and not again
        self.backward_runs = True
        self.sums = OrderedSums()
        for lane in self._lanes:
            self.sums.announce(lane.index, lane.trace)
        self._mute(self._parameters)
        self.engine.running.add(self)
        self.engine.note_backward()
        if again:
            if self.seed is not None:
                self.generators.begin()
                self._draws_again = True
            self.engine.interceptions.renew_replicas()
        elif any(call.unit.runs_again for call in self._lanes[0].units):
            # What runs again by `torch.utils.checkpoint` sets generators, several devices at a time.
            self.generators.begin()
            self._draws_again = True
        self._ready = mark(self.engine.root)
        context = contextvars.copy_context()

        def work(lane: Lane) -> None:
            context.copy().run(self._lane_backward, lane, given)

        self._start(work, self.engine.threads.lanes_at_once)

    def _lane_backward(self, lane: Lane, given: tuple[Tensor | None, ...]) -> None:
        if self.task.rematerialized is not None:
            self._run_again(lane)
        start, stop = self._offsets[lane.index], self._offsets[lane.index + 1]
        pairs = [
            (output, gradient[start:stop])
            for output, gradient in zip(lane.outputs, given, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if self._ready is not None:
            lane.fresh_gradients = Fresh(self._ready, [gradient for _, gradient in pairs])
        inputs, leaves = lane.inputs, lane.leaves
        found: Sequence[Tensor | None] = [None] * (1 + len(inputs) + len(leaves))
        if pairs:
            with torch.no_grad():
                lane.in_backward = True
                try:
                    found = gradients(
                        [output for output, _ in pairs],
                        [gradient for _, gradient in pairs],
                        [lane.anchor, *inputs, *lane.edges],
                        keep_graph=self.keeps_graph,
                    )
                finally:
                    lane.in_backward = False
        lane.gradients = found[1 : 1 + len(inputs)]
        whole = [(place, g) for place, g in zip(self._needed, lane.gradients, strict=True) if place not in self._cut]
        self.sums.add(
            OWN_CODE,
            lane.index,
            0,
            [*leaves, *(self.task.given.tensors[place] for place, _ in whole)],
            [*found[1 + len(inputs) :], *(gradient for _, gradient in whole)],
        )
        self.sums.end(lane.index)
        if not self.keeps_graph:
            lane.drop_graph()

    def _run_again(self, lane: Lane) -> None:
        """Run the forward of a lane once more, this time with a graph."""
        before = lane.trace
        try:
            tensors = self._state.run(lambda: self._lane_forward(lane, True)).tensors
        except CannotCutError as refused:
            self.engine.stop_cutting(self.name, str(refused))
            raise RuntimeError(f"the backward of {self.name} cannot be cut, because {refused}") from refused
        if lane.trace != before:
            raise RuntimeError(
                f"{self.name} called other modules when its forward was run again for the backward. Leave "
                "rematerialize out for modules that do not do the same with the same inputs."
            )
        have_graph = [place for place, tensor in enumerate(tensors) if tensor.grad_fn is not None]
        if [place for place in have_graph if place not in self._views] != self._traced:
            raise RuntimeError(
                f"other outputs of {self.name} have a gradient than in its trial. Leave rematerialize out."
            )
        lane.outputs = [tensors[place] for place in self._traced]
        known = set(map(id, self._parameters))
        if any(id(leaf) not in known for leaves in (lane.leaves, *(c.leaves for c in lane.units)) for leaf in leaves):
            raise RuntimeError(
                f"{self.name} uses a parameter that is not one of its own, whose gradient would be lost. Leave "
                "rematerialize out."
            )

    def finish_backward(self) -> list[Tensor | None]:
        """Wait for the lanes. Gradients of the inputs, then of the parameters."""
        if self._differentiated is not None:
            given, self._differentiated = self._differentiated, None
            return self._differentiable_backward(given)
        try:
            self._finish()
        finally:
            self._backward_ends()
        totals = self.sums.totals()
        self.sums.clear()  # autograd would copy gradients that somebody else holds
        inputs = self.task.given.tensors
        # A whole input that is a parameter, too, has one sum.
        of_inputs = [
            self._joined_gradient(position) if place in self._cut else totals.pop(id(inputs[place]), None)
            for position, place in enumerate(self._needed)
        ]
        for lane in self._lanes:
            lane.gradients = ()
        spare(parameter for parameter in self._parameters if id(parameter) not in totals)
        return [*of_inputs, *map(totals.get, map(id, self._parameters))]

    @property
    def _cut(self) -> tuple[int, ...]:
        return self.task.cut.positions

    def _joined_gradient(self, position: int) -> Tensor | None:
        parts = [lane.gradients[position] if lane.gradients else None for lane in self._lanes]
        if all(part is None for part in parts):
            return None
        return torch.cat(
            [
                torch.zeros_like(lane.inputs[position]) if part is None else part
                for lane, part in zip(self._lanes, parts, strict=True)
            ]
        )

    def _differentiable_backward(self, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Run the region whole once more, with a graph that can be differentiated twice."""
        if self.seed is not None:
            raise RuntimeError(
                f"create_graph=True through {self.name}, which draws random numbers and was cut into micro-batches: "
                "they cannot be drawn again for the whole batch. Set micro_batches=1."
            )
        self.engine.stop_cutting(self.name, "its gradient is differentiated again (create_graph=True)")
        inputs = self.task.given.tensors
        args, kwargs = self.task.given.build(inputs)
        if self.task.again is not None:
            args, kwargs = self.task.again.frozen.of((args, kwargs))
        with self._again(), torch.enable_grad():
            outputs = Tree(self._state.run(lambda: self.task.whole(*args, **kwargs))).tensors
            pairs = [(outputs[place], g) for place, g in zip(self._traced, given, strict=True) if g is not None]
            wanted = [*(inputs[place] for place in self._needed), *self._parameters]
            return list(
                torch.autograd.grad(
                    [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
                )
            )

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Within the block, the forward may run again: all is as it was, and running statistics are not updated."""
        again = self.task.again
        assert again is not None  # a backward has a forward that was recorded
        lost = again.surroundings.lost
        if lost is not None or self._versions != versions_of(self._needed_again):
            what = "an input, parameter or buffer" if lost is None else f"the tensor {lost[1]!r}"
            raise RuntimeError(
                f"{what} of {self.name} was changed in place after the call, but the backward needs it as it was"
            )
        with again.surroundings.in_effect(), self.task.deferred.untouched():
            yield

    # Both ways

    def abandon(self) -> None:
        """End a backward for which nobody waits, because it failed elsewhere in the user's graph."""
        self._stop()
        self._backward_ends()

    def _backward_ends(self) -> None:
        self.backward_runs = False
        self._unmute()
        self._during_backward.close()
        if self._draws_again:
            self._draws_again = False
            self.generators.end()
        self.engine.running.discard(self)


def _refuse_hook(name: str, *_: Any) -> NoReturn:
    """Stands in for methods of an output that ask for its gradient."""
    raise RuntimeError(
        f"the gradient of an output of {name} is asked for by a hook or retain_grad(), although another of its outputs "
        f"is made of it. {name} was cut into micro-batches, and only a part of that gradient passes where it is looked "
        f"for. Set micro_batches=1, or compute the other output outside of {name}."
    )


def _moved(output: Any, device: torch.device) -> Any:
    """The output on the device; a tensor that stands in two places stays one tensor."""
    return map_tensors(output, once(lambda tensor: with_attributes(to_device(tensor, device), tensor)), device)


class RegionEnter(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, call: RegionCall, anchor: Tensor, *inputs: Tensor) -> Tensor:  # noqa: D102
        ctx.call = call
        return NO_GRADIENT.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        found = ctx.call.finish_backward()
        leave_out(ctx.next_functions[1:], found)
        return (None, None, *found)


class RegionExit(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, call: RegionCall, phony: Tensor) -> Any:  # noqa: D102
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(map(torch.cat, call.columns))  # autograd records nothing in here

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: D102
        ctx.call.start_backward(gradients)
        return None, NO_GRADIENT


_enter: Any = super(torch.autograd.Function, RegionEnter).apply  # see those of `cut`
_exit: Any = super(torch.autograd.Function, RegionExit).apply
