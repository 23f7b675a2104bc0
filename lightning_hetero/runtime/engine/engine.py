"""The engine: workers, lanes and interceptions of one placed model, from its placing to its release."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.emulate import Pace
from lightning_hetero.runtime.engine import faults
from lightning_hetero.runtime.engine.batch import split_rows
from lightning_hetero.runtime.engine.batch_norm import Deferred, uses_batch
from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.intercept import ChainUnit, ModuleUnit, Region
from lightning_hetero.runtime.engine.lanes import LanePool
from lightning_hetero.runtime.engine.region import RegionCall, RegionTask
from lightning_hetero.runtime.engine.state import ThreadState, stays_in_its_thread
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.engine.verdict import ONE_ROW, Trial, Verdict, Watch
from lightning_hetero.runtime.engine.worker import Record, Worker
from lightning_hetero.runtime.layout import Layout
from lightning_hetero.schedule import Pipeline

log = logging.getLogger(__name__)

_MOST_VERDICTS = 16  # of one region; inputs that change their structure at every call would be tried for ever
_DRAIN_S = 60.0


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
        records: Where workers note what they did; None notes nothing.

    Attributes:
        cut_calls: How many calls of regions were cut so far.
        reasons: Why regions ran whole, a sentence each.
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
        records: list[Record] | None = None,
    ) -> None:
        self.root = root
        self.micro_batches = micro_batches
        self.rematerialize = rematerialize
        self._defers_batch_norm = defers_batch_norm
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)
        self.cut_calls = 0
        self.trial: Watch | None = None
        self.is_inline = False
        self.running: set[RegionCall] = set()
        self.reasons: list[str] = []
        self._hang_timeout_s = hang_timeout_s
        self._once_per_batch = once_per_batch
        self._numbers = itertools.count()
        self._one_call = threading.Lock()
        self._workers = self._make_workers(layout, paces, records)
        names = list(self._workers)
        self._stages = tuple(names.index(name) for name, _ in groupby(block.device.name for block in layout.blocks))
        # As many as keep all devices at work, and one that is handed over: the bound of 1F1B.
        self.lanes_again = len(self._workers) + 1
        devices = [root, *(worker.torch_device for worker in self._workers.values())]
        self.generators = Generators(devices)
        self.device_types = tuple(dict.fromkeys(device.type for device in devices))
        self._pool: LanePool | None = None
        self._units: list[ModuleUnit] = []
        self._regions: list[Region] = []
        compiled = [split.name or type(split.module).__name__ for split in layout.splits if _is_compiled(split.module)]
        if compiled:
            reason = f"{compiled[0]} is not cut into micro-batches, because torch.compile has made one piece of it"
            self.note(reason, "Compile its parts instead.")
        else:
            self._intercept(layout)

    # Threads

    @property
    def pool(self) -> LanePool:
        """The lanes; started, with the workers, by the first call that needs them."""
        if self._pool is None:
            threads = torch.get_num_threads()
            for worker in self._workers.values():
                worker.start()
            self._pool = LanePool(self.micro_batches)
            # A thread that sets its number of threads sets that of every thread to come, ours aside.
            torch.set_num_threads(threads)
        return self._pool

    def close(self) -> None:
        """Take all interceptions off and end the threads."""
        for region in self._regions:
            region.remove()
        for unit in self._units:
            unit.remove()
        for call in list(self.running):
            call.abandon()
        pool, self._pool = self._pool, None
        if pool is None:
            return
        ended = pool.close(_DRAIN_S)
        for worker in self._workers.values():
            worker.stop()
            worker.join(_DRAIN_S)
        if not ended or any(worker.is_alive() for worker in self._workers.values()):
            log.warning("a thread of a device is stuck and was left behind: %s", self._busy())

    def wait(self, countdown: faults.Countdown, name: str) -> None:
        """Wait for the lanes of a call of the region `name`.

        Raises:
            HangError: They take longer than `hang_timeout_s`.
        """
        if not countdown.wait(self._hang_timeout_s):
            raise faults.hang(name, self._hang_timeout_s, self._busy())

    def drain(self, countdown: faults.Countdown) -> None:
        """Wait for lanes that were told to stop."""
        if not countdown.wait(min(_DRAIN_S, self._hang_timeout_s)):
            log.warning("lanes are still running after an interruption: %s", self._busy())

    def pipeline(self, micro_batches: int) -> Pipeline:
        """The stages of the model, in order of definition, as schedules see them."""
        return Pipeline(device_of=self._stages, micro_batches=micro_batches)

    def next_number(self) -> int:
        """A number for a unit."""
        return next(self._numbers)

    def _busy(self) -> str:
        busy = [
            f"{worker.device} runs {op} of {unit} for micro-batch {lane}"
            for worker in self._workers.values()
            if (doing := worker.busy_with) is not None
            for op, unit, lane in [doing]
        ]
        return f"{'; '.join(busy) or 'No device is at work'}."

    # Calls

    def call_region(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a region, cut if it may be, else whole."""
        reason = _not_now()
        if reason is None and not self._one_call.acquire(blocking=False):
            reason = "another thread is in a cut call already"
        if reason is not None:
            self._note(region, reason)
            return region.whole(*args, **kwargs)
        try:
            prepared = self._prepare(region, args, kwargs)
            if prepared is not None:
                return self._forward(*prepared)
        except CannotCutError as refused:
            region.refuse(str(refused))
            self._note(region, str(refused))
        finally:
            self._one_call.release()
        return region.whole(*args, **kwargs)

    def stop_cutting(self, name: str, reason: str) -> None:
        """Run the regions of that name whole from now on."""
        for region in self._regions:
            if region.name == name:
                region.refuse(reason)
                self._note(region, reason)

    def _prepare(
        self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[RegionCall, dict[torch.device, Tensor]] | None:
        """The call to make, and the states of the generators before it if it draws; None to run whole."""
        given = Tree((args, kwargs))
        verdict = self._verdict(region, given, args, kwargs)
        if verdict.cut is None:
            self._note(region, verdict.reason)
            return None
        rows = verdict.cut.rows(given.tensors)
        if rows is None or rows < 2 or self.micro_batches < 2:
            return None  # a single row, or a batch of another shape than the one that was tried
        if verdict.draws and not torch.is_grad_enabled():
            # The forward of a reentrant checkpoint looks like this. Its second run, in the backward, runs whole, and
            # has to draw the same numbers.
            self._note(region, "it draws random numbers without recording gradients")
            return None
        for call in list(self.running):
            call.abandon()
        states = self.generators.states() if verdict.draws else {}
        seed = int(torch.randint(1 << 62, (), device="cpu")) if verdict.draws else None
        checks, region.checked = not region.checked, True
        task = RegionTask(
            number=self.next_call(),
            name=region.name,
            forward=region.in_lane,
            whole=region.whole,
            cut=verdict.cut,
            rows=split_rows(rows, self.micro_batches),
            given=given,
            seed=seed,
            own_code_draws=region.own_code_draws,
            checks_capture=checks,
            deferred=Deferred(filter(uses_batch, region.parts)),
            rematerialized=[p for p in region.module.parameters() if p.requires_grad] if self.rematerialize else None,
        )
        return RegionCall(self, task), states

    def _forward(self, call: RegionCall, before: dict[torch.device, Tensor]) -> Any:
        """Run a call. One random number was drawn for it, and no more, unless the region then has to run whole."""
        after = self.generators.states() if before else {}
        try:
            return call.forward()
        except CannotCutError:
            after = before
            raise
        finally:
            self.generators.restore(after)

    def _verdict(self, region: Region, given: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verdict:
        key = _key(region, given)
        verdict = region.verdicts.get(key)
        if verdict is not None:
            return verdict
        if len(region.verdicts) >= _MOST_VERDICTS:
            return Verdict(None, "the structure of its inputs keeps changing")
        watch = Watch(self.generators)
        with self.watching(watch):
            trial = Trial(
                region.module, region.in_lane, self.generators, self._once_per_batch, watch, self._defers_batch_norm
            )
            verdict = trial.verdict(args, kwargs, ThreadState(self.device_types).autocast_dtypes)
        if verdict.cut is not None or verdict.reason != ONE_ROW:
            region.verdicts[key] = verdict
        for unit in watch.units:
            unit.draws = True
        region.own_code_draws = region.own_code_draws or watch.own_code
        return verdict

    def _note(self, region: Region, reason: str) -> None:
        """Say once why a region runs whole."""
        same = "Its devices work one after the other; the results are the same."
        self.note(f"{region.name} is not cut into micro-batches, because {reason}", same)

    def note(self, reason: str, consequence: str) -> None:
        """Say once why something is not done, and what that means."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            log.warning("%s. %s", reason, consequence)

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Within the block units run in this thread and report to `watch`."""
        self.trial = watch
        try:
            yield
        finally:
            self.trial = None

    @contextmanager
    def inline(self) -> Iterator[None]:
        """Within the block regions run in this thread, whole."""
        self.is_inline = True
        try:
            yield
        finally:
            self.is_inline = False

    def next_call(self) -> int:
        """A number for a call."""
        self.cut_calls += 1
        return self.cut_calls - 1

    # Interceptions

    def _make_workers(
        self, layout: Layout, paces: Mapping[str, Pace], records: list[Record] | None
    ) -> dict[str, Worker]:
        workers: dict[str, Worker] = {}
        for block in layout.blocks:
            device = block.device
            if device.name not in workers:
                torch_device = torch.device(str(device.torch_device))
                host = torch.get_num_threads() if torch_device.type == "cpu" else 1
                threads = paces.get(device.name, Pace()).threads or host
                workers[device.name] = Worker(device.name, torch_device, threads, records)
        return workers

    def _intercept(self, layout: Layout) -> None:
        workers = {id(block.module): self._workers[block.device.name] for block in layout.blocks}
        for block in layout.blocks:
            unit = ModuleUnit(self, block.name, workers[id(block.module)], block.module)
            unit.install()
            self._units.append(unit)
        for split in layout.splits:
            used = {workers[id(part)].device for part in split.module.modules() if id(part) in workers}
            if len(used) > 1:
                region = Region(self, split.name, split.module)
                if split.chain:
                    region.chain = self._chain(split.name, split.module, workers)
                region.install()
                self._regions.append(region)

    def _chain(self, name: str, chain: nn.Module, workers: Mapping[int, Worker]) -> tuple[ChainUnit | nn.Module, ...]:
        """The children of an nn.Sequential, those that follow each other on one device together.

        Children without parameters run where the one before them ran: that is where their input is.
        """
        links: list[ChainUnit | nn.Module] = []
        worker: Worker | None = None
        together: list[tuple[str, nn.Module]] = []

        def close() -> None:
            if together and worker is not None:
                names = list(
                    dict.fromkeys(f"{name}.{key}" if name else key for key in (together[0][0], together[-1][0]))
                )
                links.append(ChainUnit(self, "…".join(names), worker, [child for _, child in together]))
            together.clear()

        for key, child in chain.named_children():
            below = [workers[id(part)] for part in child.modules() if id(part) in workers]
            if id(child) in workers or (not below and worker is not None):
                target = workers.get(id(child), worker)
                if target is not worker:
                    close()
                    worker = target
                together.append((key, child))
                continue
            close()
            links.append(child)
            worker = below[-1] if below else None
        close()
        return tuple(links)


def _key(region: Region, given: Tree) -> Any:
    """What a verdict depends on: modes and hooks of the modules, and the structure of the inputs."""
    modes = tuple((part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in region.parts)
    tensors = tuple((tensor.dim(), tensor.dtype) for tensor in given.tensors)
    values = tuple(value if value is None or isinstance(value, bool) else type(value) for value in given.values)
    return modes, tensors, values


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile would trace through calls of placed modules."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _not_now() -> str | None:
    """Why a call that user code makes at this moment has to run whole; None if it may be cut."""
    if torch._C._current_graph_task_id() != -1:
        return "it runs inside a backward, as in activation checkpointing around it"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "hooks decide what autograd saves, as in activation checkpointing around it"
    return stays_in_its_thread()
