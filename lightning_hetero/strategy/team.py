"""A run in several processes: its rows, its weights, its sums of gradients."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_hetero import __version__
from lightning_hetero.errors import ProcessError, UnsupportedError, UsageError
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.runtime.processes.batch_norm import GlobalBatchNorm
from lightning_hetero.runtime.processes.dealt_sampler import DealtBatchSampler
from lightning_hetero.runtime.processes.group import Address, Group, LinkSpeed
from lightning_hetero.runtime.processes.host_generators import follow, moves_since, states
from lightning_hetero.runtime.processes.loader import deal_loader, is_dealt_by_user, is_one_of_several
from lightning_hetero.runtime.processes.reducer import GradientReducer
from lightning_hetero.runtime.processes.row_ledger import RowLedger, Rows
from lightning_hetero.schedule.dealing import Shares
from lightning_hetero.strategy.agreement import check_agreement, check_devices, model_facts
from lightning_hetero.units import format_bytes

TRAINING = "training"

log = logging.getLogger(__name__)

GRADIENTS_VARIABLE = "HETERO_GRADIENTS"
"""Environment variable: "host" lets gradients go through host memory, whatever the devices are."""
_MARKS = 2**20  # different names of logged values; squares of that many, summed over all processes, are exact
_BUCKETS_OF_FREE = 8  # times the size of all gradients has to be free for buckets to be on a device


class Team:
    """This process and the others of a run.

    Args:
        address: Where they meet.
        shares: How much of a batch each process gets, in proportion to the others; empty: all the same.
        timeout_s: Seconds to wait for others.
        facts: What has to be equal in all processes, by a name for messages.

    Raises:
        ProcessError: Not all processes came.
        UsageError: They differ in what they are to do.

    Attributes:
        group: All processes.
        deals: Whether rows are dealt out; False leaves that to user code.
        shares: How much of a batch each process gets.
        rows: Of the batch that runs now; None outside of steps, and where user code deals the data out.
        training_loaders: Asked for the data loaders that give one batch together.
    """

    def __init__(
        self, address: Address, shares: Sequence[float], timeout_s: float, facts: Mapping[str, object]
    ) -> None:
        self.group = Group.open(address, timeout_s)
        versions = {"lightning-hetero": __version__, "torch": str(torch.__version__)}
        check_agreement(self.group, {**{f"version of {name}": v for name, v in versions.items()}, **facts})
        self.shares = Shares(shares or [1.0] * address.size)
        self._ledger = RowLedger()
        self._loaders = 0
        self._gradient_bytes = 0
        self._link: LinkSpeed | None = None
        self.deals = True
        self.rows: Rows | None = None
        self.training_loaders: Callable[[], Sequence[Any]] = tuple
        self._in_step = False
        self._logs_batch = False
        self._reducer: GradientReducer | None = None
        self._norms: GlobalBatchNorm | None = None
        self._parameters: list[nn.Parameter] = []
        self._holds_sums = False
        self._hooks: list[Any] = []  # of parameters, with manual optimization
        self._in_backward = False
        self._stray = False  # whether gradients came from a backward that this class has not seen
        self._summed: set[int] = set()  # ids of parameters whose gradients are sums that no optimizer has used yet,
        self._used: set[int] = set()  # and those that one has used in this step
        self._step_hooks: list[Any] = []  # of optimizers, with manual optimization
        self._buffers: list[tuple[nn.Module, str]] = []
        self._marks: list[tuple[int, int]] = []
        self._steps = 0
        self._drawn_from: dict[str, Any] = {}  # where generators stood before a step that some have no rows for
        self._loops: dict[str, dict[str, set[int]]] = {}  # who had rows, by loop and loader
        self._rows_had: dict[str, int] = {}  # by loop, how many this process had in the pass that goes on
        self._loop = TRAINING
        self._synced_metric = ""
        self._last: dict[str, tuple[Any, int]] = {}  # by loop, the latest batch with rows, and their number

    # The model

    def adopt(self, model: nn.Module, devices: Sequence[torch.device]) -> None:
        """Give the model of this process the values of process 0's.

        Raises:
            UsageError: The models differ, or two processes use one device; on every process.
        """
        check_devices(self.group, devices)
        check_agreement(self.group, model_facts(model))
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            self._norms = GlobalBatchNorm(model, self.group.statistics, self.group.rank, self.group.size)
        tensors = [*model.parameters(), *model.buffers()]
        self.group.broadcast_tensors([tensor.data for tensor in tensors if not tensor.is_meta])
        trained = [p for p in model.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        self._link = self.group.measure()
        self._buffers = [
            (module, name)
            for module in model.modules()
            if not isinstance(module, _BatchNorm)
            for name, buffer in module.named_buffers(recurse=False)
            if not buffer.is_meta
        ]
        self._marks = self._marks_of_buffers()
        synced = (name for name, module in model.named_modules() if getattr(module, "dist_sync_on_step", False))
        self._synced_metric = next(synced, "")

    def note(self, *, training: bool) -> str:
        """What the plan of this process has to say about the others."""
        size, link = self.group.size, self._link
        assert link is not None
        words = f"One of {size} processes that share every batch"
        if not training:
            return f"{words}."
        took, gradients = format_seconds(link.seconds(self._gradient_bytes, size)), format_bytes(self._gradient_bytes)
        return (
            f"{words}; the sum of {gradients} of gradients takes {took} a step "
            f"over the slowest link, which does {link.bytes_per_s / 1e6:.3g} MB/s, less what the backward hides."
        )

    def attach(self, model: nn.Module, *, is_manual: bool) -> None:
        """Sum the gradients of this model; again after a change of plan, which may have replaced parameters.

        Args:
            model: The placed one.
            is_manual: Whether user code runs the backward.
        """
        self._parameters = list(model.parameters())
        if self._reducer is None:
            names = [name for name, _ in model.named_parameters()]
            device = self._device_of_buckets()
            between = self.group.between_devices(device)
            if between is not None:
                log.info("gradients go from %s to those of the other processes, not through host memory", device)
            self._reducer = GradientReducer(
                self._parameters, self.group.gradients, names=names, device=device, between_devices=between
            )
        else:  # a new one would want to hear of the others, who may not have changed their plans
            self._reducer.exchange(self._parameters)
        self._let_go()
        if is_manual:
            self._hooks = [
                p.register_post_accumulate_grad_hook(self._note_backward) for p in self._parameters if p.requires_grad
            ]

    def _device_of_buckets(self) -> torch.device | None:
        """Where gradients may be added up without host memory: the only device with parameters, if it has the room."""
        devices = {parameter.device for parameter in self._parameters}
        if len(devices) != 1 or os.environ.get(GRADIENTS_VARIABLE, "") == "host":
            return None
        (device,) = devices
        if device.type == "cpu":
            return None
        # No plan counts the buckets, which take as much as the gradients.
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        free_bytes = 0 if ask is None else ask(device)[0]
        return device if _BUCKETS_OF_FREE * self._gradient_bytes <= free_bytes else None

    def _let_go(self) -> None:
        hooks = [*self._hooks, *self._step_hooks]
        self._hooks, self._step_hooks = [], []
        for hook in hooks:
            hook.remove()

    def _note_backward(self, parameter: Tensor) -> None:
        self._stray = self._stray or not self._in_backward

    def detach(self) -> None:
        """Leave the model as it was."""
        self.release_norms()
        self._let_go()
        reducer, self._reducer = self._reducer, None
        if reducer is not None:
            reducer.close()

    def close(self) -> None:
        """The run ends, on all processes."""
        self.detach()
        self.group.barrier()
        self.group.close()

    def fail(self, error: BaseException) -> None:
        """The run ends here, for this reason."""
        self.detach()
        self.group.fail(error)

    @property
    def waited_s(self) -> float:
        """Seconds that this process has spent in exchanges."""
        return self.group.waited_s + (0.0 if self._norms is None else self._norms.waited_s)

    # Data

    def dealt(self, loader: Any) -> Any:
        """The loader of this process.

        Raises:
            UnsupportedError: The rows of its batches cannot be dealt out; on every process.
            UsageError: The processes have different loaders; on every process.
        """
        if not self.deals or is_dealt_by_user(loader):
            return loader
        self._loaders += 1
        if not isinstance(loader, DataLoader):
            raise UnsupportedError(
                f"data loader {self._loaders} is a {type(loader).__name__} and no torch.utils.data.DataLoader, so "
                "nobody can deal its rows out to processes: each would use all of them. Use a DataLoader, or "
                "Trainer(use_distributed_sampler=False) with a loader that gives each process another part of the "
                "data, by torch.distributed.get_rank() and get_world_size()."
            )
        if (loader.batch_size or self.group.size) < self.group.size and self.group.rank == 0:
            log.warning(
                "batches of %s rows are worked on by one process after the other, as there are %s; a batch size of at "
                "least the number of processes lets all of them work",
                loader.batch_size,
                self.group.size,
            )
        name = f"data loader {self._loaders}"
        return deal_loader(loader, self.group, self.shares, self._ledger, name, self._is_joined)

    def _is_joined(self, sampler: DealtBatchSampler) -> bool:
        return is_one_of_several(sampler, self.training_loaders())

    def take(self, convert: Callable[[Any], Any], batch: Any) -> Any:
        """A batch comes from its loader. Stands before the host's conversion of its precision.

        Where this process has no rows, hooks of user code get an empty batch like the one before.
        """
        self.rows = rows = self._ledger.of(batch)
        if rows is not None:
            self._saw(rows)
            if self._loop != TRAINING:  # of those of the training, `training_begins` counts the rows
                self._rows_had[self._loop] += rows.own
            if rows.own:
                self._last[self._loop] = batch, rows.own
            elif self._loop in self._last:
                batch = _emptied(*self._last[self._loop])
        return convert(batch)

    def begin_loop(self, name: str) -> None:
        """A pass over data begins: its batches come from now on."""
        self._loop = name
        self._loops[name] = {}
        self._rows_had[name] = 0
        self._last.pop(name, None)

    def end_loop(self) -> None:
        """It is over, and training may go on."""
        self._loop = TRAINING

    def training_begins(self, *, is_first: bool) -> None:
        """A batch of the training was taken.

        Args:
            is_first: Whether it is the first one of its epoch.
        """
        self._loop = TRAINING
        if is_first:
            self._loops[TRAINING] = {}
        had = 0 if is_first else self._rows_had.get(TRAINING, 0)
        self._rows_had[TRAINING] = had + (0 if self.rows is None else self.rows.own)
        if self.rows is not None:
            self._saw(self.rows)

    def _saw(self, rows: Rows) -> None:
        had = self._loops.setdefault(self._loop, {}).setdefault(rows.loader, set())
        had.update(rank for rank, size in enumerate(rows.sizes) if size)

    def count(self, own: int) -> None:
        """Learn how many rows all processes have, if user code has dealt them out."""
        if self.rows is None:
            self.rows = Rows(tuple(self.group.gather(own)), self.group.rank)
            self._rows_had[TRAINING] = self._rows_had.get(TRAINING, 0) + own

    @property
    def rows_had(self) -> int:
        """How many rows this process had so far in the pass over data that goes on; 0 if nobody counts them."""
        return self._rows_had.get(self._loop, 0)

    @property
    def is_idle(self) -> bool:
        """Whether this process has no row of the batch that runs now."""
        return self.rows is not None and self.rows.own == 0

    @property
    def is_incomplete(self) -> bool:
        """Whether some process has no row of the batch that runs now."""
        return self.rows is not None and 0 in self.rows.sizes

    @property
    def weight(self) -> float:
        """The part of the batch that this process has."""
        return 1.0 if self.rows is None else self.rows.own / self.rows.total

    @contextmanager
    def step(self, *, keeps_norms: bool = False) -> Iterator[None]:
        """User code works on the rows of this process.

        Args:
            keeps_norms: Whether batch normalisation goes on to see the rows of all processes until `release_norms`,
                for a backward that runs parts of the forward again.

        Raises:
            UnsupportedError: Some processes have no rows, but the model needs those of all.
        """
        norms = self._norms
        if self.is_incomplete and self._synced_metric:
            assert self.rows is not None
            raise UnsupportedError(
                f"a batch of {self.rows.total} rows leaves some of the {self.group.size} processes without any, but "
                f"the metric {self._synced_metric} has dist_sync_on_step=True, which waits for all of them. Leave that "
                "out, set drop_last=True in the data loader, or choose another batch size."
            )
        if norms is not None:
            self._check_norms(norms)
            norms.attach()
        self._in_step = True
        try:
            yield
        except BaseException:
            self.release_norms()
            raise
        finally:
            self._in_step = False
            if not keeps_norms:
                self.release_norms()

    def release_norms(self) -> None:
        """What follows is for this process alone."""
        if self._norms is not None:
            self._norms.detach()

    def check_in_parts(self) -> None:
        """Refuse training steps in micro-batches with batch normalisation: each would be normalised on its own.

        Raises:
            UnsupportedError: On all processes.
        """
        if self._norms is not None and (name := self._norms.needs_all_ranks):
            raise UnsupportedError(
                f"micro_batching='step' with several processes would normalise each micro-batch on its own in {name}, "
                "and the processes have different numbers of them. Use micro_batching='forward'."
            )

    def _check_norms(self, norms: GlobalBatchNorm) -> None:
        if self.is_incomplete and (name := norms.needs_all_ranks):
            assert self.rows is not None
            raise UnsupportedError(
                f"a batch of {self.rows.total} rows leaves some of the {self.group.size} processes without any, but "
                f"{name} normalises over the rows of all of them. Set drop_last=True in the data loader, or choose "
                "another batch size."
            )

    def check_manual(self, optimizers: Iterable[Optimizer]) -> None:
        """A training step with manual optimization begins. Optimizers may use gradients only that are sums.

        Refuse manual optimization where some processes have no rows: nobody knows what their step would have done.

        Args:
            optimizers: Of the run.

        Raises:
            UnsupportedError: On all processes.
        """
        self._summed -= self._used
        self._used.clear()
        for hook in self._step_hooks:  # they may be other optimizers now
            hook.remove()
        self._step_hooks = [each.register_step_post_hook(self._check_used) for each in optimizers]
        if self.is_incomplete:
            assert self.rows is not None
            raise UnsupportedError(
                f"a batch of {self.rows.total} rows leaves some of the {self.group.size} processes without any, and "
                "with manual optimization they cannot follow the steps of the others. Set drop_last=True in the data "
                "loader, or choose another batch size."
            )

    def before_step(self) -> None:
        """The optimizer steps after the backward that comes: sums of gradients may go out while it runs."""
        if self._reducer is not None:
            self._reducer.begin()

    def no_loss(self) -> Tensor:
        """What a training step without rows returns."""
        return torch.zeros((), requires_grad=True)

    # Gradients

    def hold_sums(self) -> None:
        """Before a backward: sums of an earlier one that still stand are kept by one process through the next sum.

        Those are gradients that nobody has cleared: with manual optimization, and of parameters without optimizer.
        """
        if self._holds_sums and self.group.rank:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        self._holds_sums = False

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Gradients of a backward are weighted, and will be summed."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    def check_sums(self) -> None:
        """Before an optimizer steps.

        Raises:
            UsageError: Gradients came from a backward that this class has not seen.
        """
        if self._stray:
            self._stray = False
            raise UsageError(
                "the gradients of this step come from loss.backward(), which knows nothing of the other processes, so "
                "each would go its own way. Write self.manual_backward(loss) instead."
            )

    def _check_used(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After an optimizer has stepped: not before, since its closure may have run the backward."""
        self.check_sums()
        used = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if not used <= self._summed:
            raise UsageError(
                "an optimizer has stepped with gradients that do not come from self.manual_backward(loss), such as "
                "those of torch.autograd.grad. They are of the rows of this process only, so each would go its own "
                "way. Write self.manual_backward(loss) instead; for gradients g of your own, let loss be the sum of "
                "(p * g).sum() over the parameters p."
            )
        self._used |= used

    def sum_gradients(self) -> None:
        """The gradients of all processes, on all of them."""
        assert self._reducer is not None
        with self.group.answered("in the sum of gradients"):
            self._reducer.finish()
        self._holds_sums = True
        if self._hooks:
            self._summed |= {id(parameter) for parameter in self._parameters if parameter.grad is not None}

    # Exchange

    def agree(self, flag: bool) -> bool:
        """A training step begins on all processes. Whether any of them raises the flag.

        Buffers that changed anywhere become those of process 0, as with torch's DistributedDataParallel; those of batch
        normalisation are the same anyhow.

        Raises:
            ProcessError: They are not at the same step.
        """
        self._steps += 1
        self._drawn_from = states() if self.is_incomplete else {}
        word = torch.tensor([flag, self._steps, -self._steps, *self._changed()], dtype=torch.float64)
        flagged, most, least, *changed = self.group.reduce(word, dist.ReduceOp.MAX, self.group.control).tolist()
        if most != -least:
            raise ProcessError(
                f"process {self.group.rank} of {self.group.size} is at training step {self._steps}, but others are at "
                f"{int(-least)} to {int(most)}: they had different numbers of batches. Give all the same number."
            )
        self._hand_out(changed, 0)
        return bool(flagged)

    def settle(self) -> None:
        """A training step is over: what it changed is on all processes as on one that had rows for it.

        That is, buffers, and the random number generators of processes that had none.
        """
        if self.rows is None or not self.is_incomplete:
            return
        source = next(rank for rank, size in enumerate(self.rows.sizes) if size)
        moves = self.group.broadcast(moves_since(self._drawn_from), source)
        if self.is_idle:
            follow(moves)
        if self._buffers:
            word = torch.tensor(self._changed(), dtype=torch.float64)
            changed = self.group.reduce(word, dist.ReduceOp.MAX, self.group.control).tolist()
            self._hand_out(changed, source)

    def _changed(self) -> list[bool]:
        return [before != now for before, now in zip(self._marks, self._marks_of_buffers(), strict=True)]

    def _hand_out(self, changed: Sequence[float], source: int) -> None:
        for (module, name), differs in zip(self._buffers, changed, strict=True):
            if differs:
                self.group.broadcast_tensors([getattr(module, name)], source)
        self._marks = self._marks_of_buffers()

    def _marks_of_buffers(self) -> list[tuple[int, int]]:
        """Something that changes with each buffer."""
        buffers = [getattr(module, name) for module, name in self._buffers]
        return [(id(buffer), buffer._version) for buffer in buffers]

    @property
    def _present(self) -> dist.ProcessGroup | None:
        """The processes that run this step, if some have no rows for it; None: all."""
        if not self._in_step or not self.is_incomplete:
            return None
        assert self.rows is not None
        return self.group.subgroup(tuple(rank for rank, size in enumerate(self.rows.sizes) if size))

    @contextmanager
    def logging(self, *, of_batch: bool) -> Iterator[None]:
        """Something is logged, and maybe reduced at once.

        Args:
            of_batch: Whether in a step, or in a hook of a batch: a mean is one over its rows then. Where those hooks
                run, all processes take part, also those that have no rows.
        """
        self._logs_batch = of_batch
        try:
            yield
        finally:
            self._logs_batch = False

    def reduce(self, tensor: Tensor, group: Any, op: Any, name: str = "") -> Tensor:
        """As a strategy's. In a step, only processes with rows take part, and a mean is one over rows.

        Raises:
            UnsupportedError: See `check_loop`.
            UsageError: Another process has given a value of another name; on every process.
        """
        self.check_loop()
        group = self._present if group is None else group
        if not (isinstance(op, str) and op.lower() in ("mean", "avg")):
            chosen = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) else op
            return self._reduced(tensor, dist.ReduceOp.SUM if chosen is None else chosen, group, name)
        of_batch = (self._in_step or self._logs_batch) and self.rows is not None
        weight = self.weight if of_batch else 1.0 / dist.get_world_size(group)
        wide = tensor if tensor.is_floating_point() else tensor.double()  # a mean of numbers of rows is no whole number
        # What a process without rows says may be the mean of nothing.
        return self._reduced(wide * weight if weight else torch.zeros_like(wide), dist.ReduceOp.SUM, group, name)

    def _reduced(self, tensor: Tensor, op: Any, group: Any, name: str) -> Tensor:
        """Reduce a value of that name: gloo joins whatever the processes send next, so the message has to say what."""
        is_sum = op == dist.ReduceOp.SUM
        if not name or tensor.numel() != 1 or not (is_sum or op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)):
            return self.group.reduce(tensor, op, group)
        mark = zlib.crc32(name.encode()) % _MARKS
        word = torch.tensor([tensor.item(), mark, mark**2 if is_sum else -mark], dtype=torch.float64)
        value, marks, others = self.group.reduce(word, op, group).tolist()
        # The mean of squares is the square of the mean only where all are equal; so all processes find out.
        if others * dist.get_world_size(group) != marks**2 if is_sum else others != -marks:
            raise UsageError(
                f"process {self.group.rank} comes to the value that is logged as {name}, when another process comes to "
                "one of another name: they would be mixed up. Names have to be logged with sync_dist=True for the "
                "first time in the same order in every process. If they depend on the rows of a batch, which are "
                "others in each process, log all of them in each step, in one order; where there is no row for a name, "
                "0.0 with batch_size=0."
            )
        return torch.tensor(value, dtype=tensor.dtype, device=tensor.device).view(tensor.shape)

    def check_loop(self) -> None:
        """Refuse what somebody cannot take part in after a pass over data, who has not run the step that logs it.

        Raises:
            UnsupportedError: Some process had no row in it.
        """
        if self._in_step or self._logs_batch:
            return
        for loader, had in self._loops.get(self._loop, {}).items():
            if len(had) == self.group.size:
                continue
            missing = ", ".join(str(rank) for rank in range(self.group.size) if rank not in had)
            raise UnsupportedError(
                f"values of a whole pass over the data are shared by all processes, but process {missing} had no row "
                f"of {loader or 'it'}: there were too few batches of too few rows. Raise batch_size to at least the "
                "number of processes, or the number of batches (num_sanity_val_steps, limit_val_batches and the like)."
            )

    def all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        """As a strategy's. In a step, only processes with rows take part."""
        group = self._present if group is None else group
        shapes = self.group.gather(tuple(tensor.shape), group)
        if len(set(shapes)) > 1:
            raise UnsupportedError(
                "all_gather stacks tensors of one shape, but those of the processes are "
                f"{', '.join(map(str, shapes))}: each gets as many rows of a batch as it is fast enough for. Use a "
                "torchmetrics metric, which joins any number of rows, or gather sums."
            )
        host = tensor.cpu().contiguous()
        with self.group.answered("in all_gather"):
            if sync_grads:
                parts = list(functional.all_gather(host, group=dist.group.WORLD if group is None else group))
            else:
                parts = [torch.empty_like(host) for _ in shapes]
                dist.all_gather(parts, host, group=group)
        return torch.stack(parts).to(tensor.device)


def _emptied(batch: Any, rows: int) -> Any:
    """The same without rows."""

    def cut(leaf: Any) -> Any:
        return leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf

    return tree_map(cut, batch)
