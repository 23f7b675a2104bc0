"""A run in several processes: its rows, its weights, its sums of gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_hetero import __version__
from lightning_hetero.errors import ProcessError, UnsupportedError, UsageError
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.runtime.processes.batch_norm import GlobalBatchNorm
from lightning_hetero.runtime.processes.group import Address, Group, LinkSpeed
from lightning_hetero.runtime.processes.host_generators import follow, moves_since, states
from lightning_hetero.strategy.agreement import check_agreement, check_devices, model_facts
from lightning_hetero.strategy.shared_data import SharedData
from lightning_hetero.strategy.shared_gradients import SharedGradients
from lightning_hetero.units import format_bytes

_MARKS = 2**20  # different names of logged values; squares of that many, summed over all processes, are exact


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
        data: Whose rows are whose.
        gradients: Sums over all processes.
    """

    def __init__(
        self, address: Address, shares: Sequence[float], timeout_s: float, facts: Mapping[str, object]
    ) -> None:
        self.group = Group.open(address, timeout_s)
        versions = {"lightning-hetero": __version__, "torch": str(torch.__version__)}
        check_agreement(self.group, {**{f"version of {name}": v for name, v in versions.items()}, **facts})
        self.data = SharedData(self.group, shares or [1.0] * address.size)
        self.gradients = SharedGradients(self.group)
        self._gradient_bytes = 0
        self._link: LinkSpeed | None = None
        self._in_step = False
        self._logs_batch = False
        self._norms: GlobalBatchNorm | None = None
        self._buffers: list[tuple[nn.Module, str]] = []
        self._marks: list[tuple[int, int]] = []
        self._steps = 0
        self._drawn_from: dict[str, Any] = {}  # where generators stood before a step that some have no rows for
        self._synced_metric = ""

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

    def detach(self) -> None:
        """Leave the model as it was."""
        self.release_norms()
        self.gradients.detach()

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
        if self.data.is_incomplete and self._synced_metric:
            raise UnsupportedError(
                f"{self._rows_for_some}, but the metric {self._synced_metric} has dist_sync_on_step=True, which "
                "waits for all of them. Leave that out, set drop_last=True in the data loader, or choose another batch "
                "size."
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
        if self.data.is_incomplete and (name := norms.needs_all_ranks):
            raise UnsupportedError(
                f"{self._rows_for_some}, but {name} normalises over the rows of all of them. Set "
                "drop_last=True in the data loader, or choose another batch size."
            )

    def check_manual(self, optimizers: Iterable[Optimizer]) -> None:
        """A training step with manual optimization begins. Optimizers may use gradients only that are sums.

        Refuse manual optimization where some processes have no rows: nobody knows what their step would have done.

        Args:
            optimizers: Of the run.

        Raises:
            UnsupportedError: On all processes.
        """
        self.gradients.watch(optimizers)
        if self.data.is_incomplete:
            raise UnsupportedError(
                f"{self._rows_for_some}, and with manual optimization they cannot follow the steps of the others. "
                "Set drop_last=True in the data loader, or choose another batch size."
            )

    @property
    def _rows_for_some(self) -> str:
        assert self.data.rows is not None
        return f"a batch of {self.data.rows.total} rows leaves some of the {self.group.size} processes without any"

    def no_loss(self) -> Tensor:
        """What a training step without rows returns."""
        return torch.zeros((), requires_grad=True)

    # Exchange

    def agree(self, flag: bool) -> bool:
        """A training step begins on all processes. Whether any of them raises the flag.

        Buffers that changed anywhere become those of process 0, as with torch's DistributedDataParallel; those of batch
        normalisation are the same anyhow.

        Raises:
            ProcessError: They are not at the same step.
        """
        self._steps += 1
        self._drawn_from = states() if self.data.is_incomplete else {}
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
        if self.data.rows is None or not self.data.is_incomplete:
            return
        source = next(rank for rank, size in enumerate(self.data.rows.sizes) if size)
        moves = self.group.broadcast(moves_since(self._drawn_from), source)
        if self.data.is_idle:
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
        if not self._in_step or not self.data.is_incomplete:
            return None
        assert self.data.rows is not None
        return self.group.subgroup(tuple(rank for rank, size in enumerate(self.data.rows.sizes) if size))

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
        of_batch = (self._in_step or self._logs_batch) and self.data.rows is not None
        weight = self.data.weight if of_batch else 1.0 / dist.get_world_size(group)
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
        for loader, ranks in self.data.without_rows().items():
            raise UnsupportedError(
                "values of a whole pass over the data are shared by all processes, but process "
                f"{', '.join(map(str, ranks))} had no row of {loader or 'it'}: there were too few batches of too few "
                "rows. Raise batch_size to at least the number of processes, or the number of batches "
                "(num_sanity_val_steps, limit_val_batches and the like)."
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
