"""Puts a plan into effect on a module, and takes it back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.graph.find import is_metric
from lightning_hetero.plan.plan import Plan
from lightning_hetero.runtime import frames
from lightning_hetero.runtime.activation_checkpointing import Checkpointed, checkpoint_blocks
from lightning_hetero.runtime.borders import EnterBlock, EnterSplit, LeaveBlock, LeaveSplit
from lightning_hetero.runtime.compiled import Compiled, compile_blocks, is_compiled, keep_out_of_graphs
from lightning_hetero.runtime.confinement import Confinement, Declare
from lightning_hetero.runtime.emulate import METER, EnterEmulated, LeaveEmulated, Pace, paces
from lightning_hetero.runtime.engine.engine import Engine
from lightning_hetero.runtime.engine.record import Recorder, Recording
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.guard import guard, release
from lightning_hetero.runtime.hooks import add_hook_before, add_hooks
from lightning_hetero.runtime.layout import Block, Layout, lay_out
from lightning_hetero.runtime.reconcile import DeviceReconciler
from lightning_hetero.runtime.relocate import Replaced, relocate
from lightning_hetero.runtime.scripting import make_scriptable


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelining:
    """How batches flow through the devices of a plan.

    Attributes:
        micro_batches: How many a batch is cut into; 1 does not cut.
        rematerialize: Whether the backward runs the forward of each micro-batch again, to keep fewer activations.
        defers_batch_norm: Whether micro-batches are normalised by their own mean and variance.
        hang_timeout_s: Seconds after which a call that has not ended is given up.
        once_per_batch: Names of methods of the model that must not be called for a part of a batch.
        weights: Shares of the rows that micro-batches get, in proportion to each other; none: all the same.
        around: Gives values that user code may decide by, such as the epoch. Where they change, cutting is tried anew.
        compiler: Arguments of `torch.compile` for each part of the model; None does not compile.
        confinement: Keeps batches from devices that are not trusted; None: all are.
    """

    micro_batches: int = 1
    rematerialize: bool = False
    defers_batch_norm: bool = False
    hang_timeout_s: float = 600.0
    once_per_batch: Sequence[str] = ()
    weights: Sequence[float] = ()
    around: Callable[[], Sequence[Hashable]] = tuple
    compiler: Mapping[str, Any] | None = None
    confinement: Confinement | None = None


class PlacedModel:
    """A module whose parts stand where a plan wants them.

    Connected mode: the module's own code runs, one part after the other, with its ordinary autograd graph. Inputs
    move where a block begins, outputs return to the root device where control returns to user code.

    Pipelined mode: calls of modules that lie on several devices are cut into micro-batches, wherever that changes
    nothing, and the devices work at the same time; see `lightning_hetero.runtime.engine`.

    Args:
        module: The module. It stays the same object, as do its parameters.
        plan: A checked plan for it.
        pipelining: Whether and how to cut batches.

    Attributes:
        engine: What runs pipelined calls; None in connected mode.
        spans_devices: Whether tensors live on more than one device of torch. Worked out once: it is asked every step.
        replaced: Pairs of old and new Parameter where torch did not let one keep its identity; optimizers that
            hold the old one must be given the new one. Usually empty.
    """

    def __init__(self, module: nn.Module, plan: Plan, pipelining: Pipelining | None = None) -> None:
        self.module = module
        self.plan = plan
        self.root = torch.device(str(plan.root.torch_device))
        self.pipelining = pipelining or Pipelining()
        self.engine: Engine | None = None
        self.spans_devices = len(plan.torch_devices) > 1
        self.replaced: Replaced = []
        inventory = plan.inventory
        self.layout: Layout = lay_out(
            module,
            {unit: inventory[name] for unit, name in plan.device_of.items()},
            {
                unit: tuple((inventory[share.device], share.share) for share in shares)
                for unit, shares in plan.shares_of.items()
            },
        )
        self._paces = paces(plan.devices)
        self._recorder = Recorder()
        self._buffers: list[tuple[nn.Module, torch.device]] = []
        self._checkpointed: list[Checkpointed] = []
        self._compiled: list[Compiled] = []

    def place(self, before_hooks: Callable[[nn.Module, Layout], Layout] | None = None) -> None:
        """Move parameters, buffers and metrics, and put the hooks and guards on.

        Args:
            before_hooks: Called in between with the module and its layout; may exchange blocks for others.

        Raises:
            PlacementError: A parameter has no values (meta device).
            UnsupportedError: The plan wants activation checkpointing of a stage with replicas, or of one to compile.
        """
        self._checkpointed_blocks()  # refused before anything moves
        targets = list(self._targets())
        self.replaced = relocate(targets, self.module)
        for metric, device in self._metrics():
            metric.to(device)
        self._buffers = [(module, device) for module, device in targets if module._buffers]
        if before_hooks is not None:
            self.layout = before_hooks(self.module, self.layout)
        self._hook()
        if any(map(is_compiled, self.module.modules())):
            keep_out_of_graphs()
        if self.pipelining.compiler is not None:
            self._compiled = compile_blocks(self.layout.blocks, self.pipelining.compiler)
        if self.spans_devices:
            guard((module for module, _ in targets), self.root)
        places = {device.name for block in self.layout.blocks for device in block.devices}
        if self.pipelining.micro_batches > 1 and len(places) > 1:
            self.engine = Engine(
                self.module,
                self.layout,
                self.root,
                self.pipelining.micro_batches,
                rematerialize=self.pipelining.rematerialize,
                defers_batch_norm=self.pipelining.defers_batch_norm,
                paces=self._paces,
                hang_timeout_s=self.pipelining.hang_timeout_s,
                once_per_batch=self.pipelining.once_per_batch,
                around=self.pipelining.around,
                recorder=self._recorder,
                weights=self.pipelining.weights,
                confinement=self.pipelining.confinement,
            )
        self._checkpointed = self._checkpoint()
        if self.spans_devices or self._is_paced or self.engine or self._compiled or self._checkpointed:
            changed = (
                *(split.module for split in self.layout.splits),
                *(block.module for block in self.layout.blocks),
            )
            make_scriptable(changed, self.root)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Within the block, note which device does what, and when.

        Only what runs in micro-batches is seen: not user code between modules, and not calls that ran whole, of
        which the engine's `reasons` tell why.

        Yields:
            What has been recorded; its `timeline` may be asked for at any time, also after the block.

        Raises:
            UsageError: There is nothing to record in connected mode; or a recording runs already.

        Example:
            with placed.recording() as recording:
                model(batch).sum().backward()
            print(draw(recording.timeline))
        """
        if self.engine is None:
            raise UsageError(
                "this model runs in connected mode, one device after the other, so there is no timeline to record. "
                "Place it on several devices, with micro_batches of at least 2."
            )
        if self._recorder.records is not None:
            raise UsageError("this model is being recorded already; end that recording before another begins")
        recording = Recording((device.name for device in self.plan.used), self.engine.stage_of)
        self._recorder.records = recording.records
        try:
            yield recording
        finally:
            self._recorder.records = None

    def return_buffers(self) -> None:
        """Bring buffers back that user code or a callback replaced by new ones elsewhere.

        StochasticWeightAveraging, for one, makes new running statistics on the root device.
        """
        if not self.spans_devices:
            return
        astray = [
            (module, device)
            for module, device in self._buffers
            if any(buffer is not None and buffer.device != device for buffer in module._buffers.values())
        ]
        if astray:
            relocate(astray, self.module)

    def release(self, device: torch.device | None = None) -> Replaced:
        """Take hooks and guards off and, if a device is given, gather everything there.

        Returns:
            Pairs of old and new Parameter, as in `replaced`.
        """
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()
        for module in (*self._checkpointed, *self._compiled):
            module.remove()
        release(self.module)
        frames.cut_to(0)
        METER.rest()
        if device is None:
            return []
        replaced = relocate([(module, device) for module, _ in self._targets()], self.module)
        for metric, _ in self._metrics():
            metric.to(device)
        return replaced

    def reconciler(self) -> DeviceReconciler | None:
        """The mode under which user code may mix tensors of several devices; None if there is only one."""
        compiled = any(hasattr(module, "_orig_mod") for module in self.module.modules())
        compiled = compiled or is_compiled(self.module)
        # torch.compile would trace through the mode at every operation.
        return DeviceReconciler(self.root) if self.spans_devices and not compiled else None

    @property
    def _is_paced(self) -> bool:
        """Whether some device is played by the CPU."""
        return any(pace != Pace() for pace in self._paces.values())

    def _targets(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """Every module with the device of the tensors that it owns itself."""
        for split in self.layout.splits:
            yield split.module, self.root
        in_block: set[int] = set()
        for block in self.layout.blocks:
            device = torch.device(str(block.device.torch_device))
            for module in block.module.modules():
                if id(module) not in in_block:
                    in_block.add(id(module))
                    yield module, device
        known = in_block | {id(split.module) for split in self.layout.splits}
        apart = (*self.layout.metrics, *self.layout.placed_elsewhere)
        known |= {id(inner) for module in apart for inner in module.modules()}
        for module in self.module.modules():
            if id(module) not in known:
                yield module, self.root

    def _metrics(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """Metrics, whose states are no buffers, and where they belong: to what has them if that is one part."""
        for metric in self.layout.metrics:
            yield metric, self.root
        for block in self.layout.blocks:
            device = torch.device(str(block.device.torch_device))
            yield from ((each, device) for each in block.module.modules() if is_metric(each))

    def _checkpointed_blocks(self) -> list[Block]:
        units = self.plan.checkpointed
        blocks = [b for b in self.layout.blocks if any(f"{unit}.".startswith(f"{b.name}.") for unit in units)]
        shared = next((block for block in blocks if block.shares), None)
        if shared is not None:
            raise UnsupportedError(
                f"{shared.name} has replicas, which keep their activations, so activation checkpointing on "
                f"{shared.device.name} would not save what it promises. Leave out activation_checkpointing for "
                f"{shared.device.name}, or the replicas; rematerialize=True works with both."
            )
        if blocks and self.pipelining.compiler is not None:
            raise UnsupportedError(
                f"{blocks[0].name} cannot be compiled as one piece and have layers that run again in the backward. "
                "Leave out compile, or activation_checkpointing; rematerialize=True works with compile."
            )
        return blocks

    def _checkpoint(self) -> list[Checkpointed]:
        """Let blocks of the stages that the plan says keep their inputs only."""
        blocks = self._checkpointed_blocks()
        if not blocks:
            return []
        devices = [torch.device("cpu"), *(torch.device(str(block.device.torch_device)) for block in blocks)]
        known = self.engine.generators.of if self.engine is not None else {}
        return checkpoint_blocks(self.module, blocks, {**Generators(devices).of, **known})

    def _hook(self) -> None:
        for split in self.layout.splits:
            # The root of a LightningModule is called by the host; its code is the user's step.
            if self.spans_devices and (split.module is not self.module or split.chain):
                add_hooks(split.module, EnterSplit(self.root, split.chain), LeaveSplit(self.root))
        for block in self.layout.blocks:
            if self.spans_devices:
                device = torch.device(str(block.device.torch_device))
                add_hooks(block.module, EnterBlock(device), LeaveBlock(self.root), with_kwargs=True)
            # Also where nothing is stretched: the backward of a slow block ends where that of another one begins.
            pace = self._paces.get(block.device.name, Pace())
            if self._is_paced:
                add_hooks(block.module, EnterEmulated(pace), LeaveEmulated(pace))
            confinement = self.pipelining.confinement
            if confinement is not None and block.device.name not in confinement.trusted:
                add_hook_before(block.module, Declare(confinement, block.name, block.device.name))
