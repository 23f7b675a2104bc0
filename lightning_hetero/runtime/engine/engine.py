"""The engine: workers, lanes and interceptions of one placed model, from its placing to its release."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.compiled import is_compiled
from lightning_hetero.runtime.confinement import Confinement
from lightning_hetero.runtime.emulate import Pace
from lightning_hetero.runtime.engine.attributes import Attributes
from lightning_hetero.runtime.engine.batch import has_item_for_each_row, size_of
from lightning_hetero.runtime.engine.batch_norm import Deferred, using_batch
from lightning_hetero.runtime.engine.contents import is_users
from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.ended import EndedThreads
from lightning_hetero.runtime.engine.intercept import Region
from lightning_hetero.runtime.engine.interceptions import Interceptions
from lightning_hetero.runtime.engine.record import Recorder
from lightning_hetero.runtime.engine.refused import methods_refused
from lightning_hetero.runtime.engine.region import RegionCall
from lightning_hetero.runtime.engine.region_task import Again, RegionTask
from lightning_hetero.runtime.engine.state import (
    ThreadState,
    are_operations_counted,
    has_global_hooks,
    saves_otherwise,
    stays_in_its_thread,
)
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.engine.surroundings import Surroundings
from lightning_hetero.runtime.engine.threads import Threads
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.trial import Trial
from lightning_hetero.runtime.engine.verdict import Verdict
from lightning_hetero.runtime.engine.watch import Listener, Watch
from lightning_hetero.runtime.frozen import Frozen
from lightning_hetero.runtime.layout import Layout
from lightning_hetero.schedule import Pipeline
from lightning_hetero.schedule.rows import split_rows

log = logging.getLogger(__name__)

_MOST_TRIES = 3  # of a region that changes something: it may be a cache, which is filled at the first call
_MOST_VERDICTS = 64  # that a region keeps
# By these names code gets at buffers of any name.
_NAMES_ANY_BUFFER = (
    "__dict__", "__getattribute__", "_buffers", "buffers", "getattr", "named_buffers", "state_dict", "vars",
)  # fmt: skip
_TRIALS_AT_ONCE = 32  # that a region may have before its calls have to pay for them
_CALLS_PER_TRIAL = 8


class Engine:
    """Runs the regions of a placed model in micro-batches, one thread per device.

    A region is a module whose units lie on several devices. User code calls it as ever; the engine decides for each
    call whether it may be cut, and lets it run whole where it may not.

    Args:
        module: The placed model.
        layout: What each of its modules is.
        root: The device of user code.
        micro_batches: How many a batch is cut into.
        rematerialize: Whether to run the forward of each micro-batch again in the backward instead of keeping what
            the backward needs of all of them.
        defers_batch_norm: Whether micro-batches are normalised by their own mean and variance, with running
            statistics of the whole batch. If not, a region with batch normalisation in training runs whole.
        paces: Threads of emulated devices, by name.
        hang_timeout_s: Seconds after which a call that has not ended is given up.
        once_per_batch: Names of methods of the model that user code must not call for a part of a batch.
        around: Gives values that user code may decide by, such as the epoch.
        recorder: Where workers note what they did; None notes nothing.
        weights: Shares of the rows that micro-batches get; none: all the same.
        confinement: Keeps batches from devices that are not trusted; None: all are.

    Attributes:
        cut_calls: How many calls of regions were cut so far.
        reasons: Why regions ran whole, a sentence each.
        backwards: Of user code, that regions take part in and that have not ended.
        threads: The workers and the lanes.
        interceptions: What stands in the place of the modules' calls.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        root: torch.device,
        micro_batches: int,
        *,
        rematerialize: bool = False,
        defers_batch_norm: bool = False,
        paces: Mapping[str, Pace],
        hang_timeout_s: float,
        once_per_batch: Sequence[str] = (),
        around: Callable[[], Sequence[Hashable]] = tuple,
        recorder: Recorder | None = None,
        weights: Sequence[float] = (),
        confinement: Confinement | None = None,
    ) -> None:
        self.root = root
        self.confinement = confinement
        self._around = around
        self.micro_batches = micro_batches
        self.weights = tuple(weights)
        self.rematerialize = rematerialize
        self._defers_batch_norm = defers_batch_norm
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)
        self.cut_calls = 0
        self._local = _Local()
        self._module = module
        self.running: set[RegionCall] = set()
        self.backwards = 0
        self.reasons: list[str] = []
        self._once_per_batch = once_per_batch
        self._numbers = itertools.count()
        self._one_call = threading.Lock()
        self.threads = Threads(layout, paces, recorder or Recorder(), micro_batches, hang_timeout_s)
        workers = self.threads.workers
        names = list(workers)
        stages = [list(run) for _, run in groupby(layout.blocks, key=lambda block: (block.device.name, block.shares))]
        self._stages = tuple(names.index(blocks[0].device.name) for blocks in stages)
        stage_of = {id(block.module): index for index, blocks in enumerate(stages) for block in blocks}
        # Those that own no stage: schedules know owners only, and a replica wants work too.
        self.more_devices = len(workers) - len(set(self._stages))
        devices = [root, *(worker.torch_device for worker in workers.values())]
        self.generators = Generators([*devices, torch.device("cpu")])  # whose numbers code for any device may use
        self.device_types = tuple(dict.fromkeys(device.type for device in devices))
        self.interceptions = Interceptions(self, workers, stage_of, paces)
        compiled = [split.name or type(split.module).__name__ for split in layout.splits if is_compiled(split.module)]
        if compiled:
            reason = f"{compiled[0]} is not cut into micro-batches, because torch.compile has made one piece of it"
            self.note(reason, "Compile its parts instead.")
        else:
            self.interceptions.install(layout)

    def close(self) -> None:
        """Take all interceptions off and end the threads. A backward that comes later is an error."""
        self.interceptions.remove()
        for call in list(self.running):
            call.abandon()
        self.threads.close()
        self.threads = EndedThreads(self.threads, self.running)

    def note_backward(self) -> None:
        """Within a backward of user code: count it among `backwards` until it ends."""
        self.backwards += 1

        def end() -> None:
            self.backwards -= 1

        autograd: Any = torch.autograd.Variable._execution_engine
        autograd.queue_callback(end)

    def pipeline(self, micro_batches: int) -> Pipeline:
        """The stages of the model, in order of definition, as schedules see them."""
        return Pipeline(device_of=self._stages, micro_batches=micro_batches)

    @property
    def stage_of(self) -> dict[str, int]:
        """Index of the stage of everything that workers run in one piece, by its name."""
        return {unit.name: unit.stage for unit in self.interceptions.tasks}

    @property
    def in_units(self) -> set[int]:
        """`id` of all modules that workers run."""
        return {id(part) for unit in self.interceptions.units for module in unit.parts for part in module.modules()}

    def split(self, rows: int) -> list[int]:
        """Rows of each micro-batch of a batch."""
        return split_rows(rows, self.micro_batches, self.weights)

    @property
    def has_replicas(self) -> bool:
        """Whether some unit stands on several devices."""
        return bool(self.interceptions.seats)

    def next_number(self) -> int:
        """A number for a unit."""
        return next(self._numbers)

    # Calls

    def call_region(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a region, cut if it may be, else whole."""
        reason = _not_now()
        if reason is None and not self._one_call.acquire(blocking=False):
            reason = "another thread is in a cut call already"
        if reason is not None:
            if not are_operations_counted():  # then it says nothing about the calls to come
                self._note(region, reason)
            return region.whole(*args, **kwargs)
        try:
            prepared = self._prepare(region, args, kwargs)
            if prepared is not None:
                return self._forward(region, *prepared)
        except CannotCutError as refused:
            region.refuse(str(refused))
            self._note(region, str(refused))
        finally:
            self._one_call.release()
        return region.whole(*args, **kwargs)

    def stop_cutting(self, name: str, reason: str) -> None:
        """Run the regions of that name whole from now on."""
        for region in self.interceptions.regions:
            if region.name == name:
                region.refuse(reason)
                self._note(region, reason)

    def _prepare(
        self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[RegionCall, dict[torch.device, Tensor], Attributes] | None:
        """The call to make; the states of the generators, and the attributes, before it. None to run whole."""
        given = Tree.of_call(args, kwargs)
        modules = _modules(region.module)  # once: torch goes through all of them for each question
        parameters = _own([module._parameters for module in modules])
        # torch.func.functional_call puts other tensors in the place of parameters.
        if not all(parameter.is_leaf for parameter in parameters):
            self._note(region, "its parameters are computed from others")
            return None
        if self.rematerialize and not all(isinstance(parameter, nn.Parameter) for parameter in parameters):
            self._note(region, "its parameters are replaced for this call, and may not be there for its backward")
            return None
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        verdict = self._verdict(region, modules, given, args, kwargs, trainable)
        if verdict.cut is None:
            self._note(region, verdict.reason)
            return None
        rows = verdict.cut.rows(given.tensors)
        if rows is None:
            return None  # a batch of another shape than the one that was tried
        if (given.values or given.has_containers) and has_item_for_each_row((args, kwargs), rows):
            self._note(region, "it is called with a list that has an item for each row, and is not cut with them")
            return None
        modules = [*modules, *region.keys.hidden]
        normalised = using_batch(modules)
        parts = self.split(rows)
        if normalised and min(parts) < 2:  # a single value has no variance
            parts = split_rows(rows, min(self.micro_batches, rows // 2))
        if len(parts) < 2:
            return None  # a single row, say
        if verdict.draws and not torch.is_grad_enabled():
            # The forward of a reentrant checkpoint looks like this. Its second run, in the backward, runs whole, and
            # has to draw the same numbers.
            self._note(region, "it draws random numbers without recording gradients")
            return None
        for call in list(self.running):
            if call.thread == threading.get_ident():  # another thread may wait for its own
                call.abandon()
        attributes = Attributes(modules)
        with_buffers = [module for module in modules if module._buffers]
        states = self.generators.states()
        seed = int(torch.randint(1 << 62, (), device="cpu")) if verdict.draws else None
        task = RegionTask(
            number=self.next_call(),
            name=region.name,
            forward=region.in_lane,
            whole=region.whole,
            cut=verdict.cut,
            rows=parts,
            given=given,
            seed=seed,
            own_code_draws=region.own_code_draws,
            deferred=Deferred(normalised),
            traced=verdict.traced,
            upstream=verdict.upstream,
            views=verdict.views,
            buffers=_own([module._buffers for module in with_buffers]),
            again=Again(
                [
                    *parameters,
                    *_own([_that_count(each, region.names) for each in with_buffers if each not in normalised]),
                ],
                Surroundings(region.keys.used, attributes),
                Frozen(given.values),
            )
            if torch.is_grad_enabled()
            else None,
            rematerialized=trainable if self.rematerialize else None,
        )
        return RegionCall(self, task), states, attributes

    def _forward(
        self, region: Region, call: RegionCall, before: dict[torch.device, Tensor], attributes: Attributes
    ) -> Any:
        """Run a call. One random number was drawn for it, and no more, unless the region then has to run whole."""
        after = self.generators.states() if call.seed is not None else {}
        try:
            try:
                with methods_refused([self._module, region.module], self._once_per_batch):
                    result = call.forward()
            except BaseException as error:
                changed = attributes.put_back()
                if changed is None or not isinstance(error, Exception):
                    raise
                raise _has_changed(region, changed) from error  # one micro-batch may have disturbed another
            if (changed := attributes.put_back()) is not None:
                raise _has_changed(region, changed)
            if call.seed is None and self.generators.drawn_since(before):
                region.verdicts.clear()  # the next call has a new trial, which sees who draws
                raise CannotCutError("it draws random numbers, which it did not do in its trial")
            lost = self.interceptions.lost_by_replicas
            if lost is not None:
                region.verdicts.clear()
                self.note_lost(lost)
            return result
        except CannotCutError:
            after = before
            raise
        finally:
            self.generators.restore(after)

    def _verdict(
        self,
        region: Region,
        modules: Sequence[nn.Module],
        given: Tree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        trainable: Sequence[nn.Parameter],
    ) -> Verdict:
        if "global_step" in region.names:
            return Verdict(None, "its forward names global_step, and so may do something else in any step")
        key = region.keys.of(modules, given, trainable, self._around(), always="current_epoch" in region.names)
        if (name := region.keys.changing) is not None:
            may_differ = "which keeps changing, so that it may do something else in any step"
            return Verdict(None, f"its forward reads {name!r}, {may_differ}")
        region.calls += 1
        kept = region.verdicts.get(key)
        verdict = known = None if kept is None else kept.on(given.tensors)
        # Code may have a rule for batches, or rows, from some size on.
        if verdict is not None and (verdict.cut is None or size_of(verdict.cut, given.tensors).is_within(verdict.size)):
            return verdict
        if region.trials >= _TRIALS_AT_ONCE + region.calls // _CALLS_PER_TRIAL:
            return verdict or Verdict(None, "the structure of its inputs keeps changing")
        region.trials += 1
        watch = Watch(self.generators)
        watch.other_backwards = lambda: self.backwards
        with self.watching(watch):
            trial = Trial(
                region.module,
                region.in_lane,
                self.generators,
                self._once_per_batch,
                watch,
                self.split,
                self._defers_batch_norm,
                self._module,
            )
            verdict = trial.verdict(args, kwargs, ThreadState(self.device_types).autocast_dtypes)
        region.tries[key] += not verdict.final
        if known is not None and verdict.cut is not None:
            verdict = replace(verdict, size=verdict.size.joined(known.size))
        elif known is not None and not verdict.final:  # such as a batch of one row: nothing new
            return verdict
        if verdict.final or region.tries[key] >= _MOST_TRIES:
            region.verdicts[key] = verdict.beside(kept, given.tensors)
            for old in list(region.verdicts)[:-_MOST_VERDICTS]:
                del region.verdicts[old]
        for unit in watch.units:
            unit.draws = True
        region.own_code_draws = region.own_code_draws or watch.own_code
        return verdict

    def _note(self, region: Region, reason: str) -> None:
        """Say once why a region runs whole."""
        same = "Its devices work one after the other; the results are the same."
        self.note(f"{region.name} is not cut into micro-batches, because {reason}", same)

    def note_lost(self, lost: str) -> None:
        """Say once what a replica has set in vain."""
        self.note(
            f"{lost} was set on a replica, which did not happen when this was tried",
            "It is lost there: only what the device of the parameters has set is kept. Do not change modules in "
            "forward, or leave out the replicas.",
        )

    def note(self, reason: str, consequence: str) -> None:
        """Say once why something is not done, and what that means."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            log.warning("%s. %s", reason, consequence)

    @property
    def trial(self) -> Listener | None:
        """To whom units report that this thread calls."""
        return self._local.trial

    @property
    def is_inline(self) -> bool:
        """Whether regions that this thread calls run in it, whole."""
        return self._local.is_inline

    @contextmanager
    def watching(self, watch: Listener) -> Iterator[None]:
        """Within the block units run in this thread and report to `watch`."""
        self._local.trial = watch
        try:
            yield
        finally:
            self._local.trial = None

    @contextmanager
    def inline(self) -> Iterator[None]:
        """Within the block regions run in this thread, whole."""
        self._local.is_inline = True
        try:
            yield
        finally:
            self._local.is_inline = False

    def next_call(self) -> int:
        """A number for a call."""
        self.cut_calls += 1
        return self.cut_calls - 1


def _modules(root: nn.Module) -> list[nn.Module]:
    """What `root.modules()` goes through, without a generator for every level."""
    found: dict[nn.Module, None] = {}
    todo = [root]
    while todo:
        module = todo.pop()
        if module not in found:
            found[module] = None
            if module._modules:
                todo += [child for child in list(module._modules.values())[::-1] if child is not None]
    return list(found)


def _that_count(module: nn.Module, names: Container[str]) -> Mapping[str, Any]:
    """The buffers of a module that its forward may look at: a counter of steps is for others.

    Args:
        module: The module.
        names: What the code of the region names.
    """
    if not is_users(type(module)) or any(name in names for name in _NAMES_ANY_BUFFER):
        return module._buffers
    return {name: buffer for name, buffer in module._buffers.items() if name in names}


def _own(found: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The parameters or buffers of some modules, each once."""
    known: dict[int, Any] = {}
    for each in found:
        if each:  # most modules have none
            for tensor in each.values():
                if tensor is not None:
                    known[id(tensor)] = tensor
    return list(known.values())


class _Local(threading.local):
    trial: Listener | None = None
    is_inline = False


def _has_changed(region: Region, changed: str) -> CannotCutError:
    region.verdicts.clear()  # the next call has a new trial
    return CannotCutError(f"its forward {changed}, which it did not do in its trial")


def _not_now() -> str | None:
    """Why a call that user code makes at this moment has to run whole; None if it may be cut."""
    if torch.nn.utils.parametrize._cache_enabled:
        return "parametrizations are cached around it, so that all its micro-batches would be one graph"
    if torch._C._current_graph_task_id() != -1:
        return "it runs inside a backward, as in activation checkpointing around it"
    if saves_otherwise():
        return "hooks decide what autograd saves, as in activation checkpointing around it"
    if has_global_hooks():
        return "hooks of user code on all modules would see parts of a batch"
    return stays_in_its_thread()
