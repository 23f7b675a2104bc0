"""A run in several processes: its rows, its weights, its sums of gradients."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.runtime.processes.batch_norm import GlobalBatchNorm
from lightning_hetero.runtime.processes.group import Address, Group, LinkSpeed
from lightning_hetero.runtime.processes.loader import deal_loader, is_dealt_by_user
from lightning_hetero.runtime.processes.reducer import GradientReducer
from lightning_hetero.runtime.processes.row_ledger import RowLedger, Rows
from lightning_hetero.schedule.dealing import Shares
from lightning_hetero.strategy.agreement import check_agreement, check_devices, model_facts
from lightning_hetero.units import format_bytes

log = logging.getLogger(__name__)


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
    """

    def __init__(
        self, address: Address, shares: Sequence[float], timeout_s: float, facts: Mapping[str, object]
    ) -> None:
        self.group = Group.open(address, timeout_s)
        versions = {name: importlib.metadata.version(name) for name in ("lightning-hetero", "torch")}
        check_agreement(self.group, {**{f"version of {name}": v for name, v in versions.items()}, **facts})
        self.shares = Shares(shares or [1.0] * address.size)
        self._ledger = RowLedger()
        self._loaders = 0
        self._gradient_bytes = 0
        self._link: LinkSpeed | None = None
        self.deals = True
        self.rows: Rows | None = None
        self._in_step = False
        self._reducer: GradientReducer | None = None
        self._norms: GlobalBatchNorm | None = None
        self._parameters: list[nn.Parameter] = []
        self._holds_sums = False

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

    def attach(self, model: nn.Module) -> None:
        """Sum the gradients of this model."""
        self.detach()
        self._parameters = list(model.parameters())
        names = [name for name, _ in model.named_parameters()]
        self._reducer = GradientReducer(self._parameters, self.group.gradients, names=names)
        self._holds_sums = False

    def detach(self) -> None:
        """Leave the model as it was."""
        self.release_norms()
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
        return self.group.waited_s

    # Data

    def dealt(self, loader: Any) -> Any:
        """The loader of this process.

        Raises:
            UsageError: The rows of its batches cannot be dealt out; on every process.
        """
        if not self.deals or not isinstance(loader, DataLoader) or is_dealt_by_user(loader):
            return loader
        self._loaders += 1
        if (loader.batch_size or self.group.size) < self.group.size and self.group.rank == 0:
            log.warning(
                "batches of %s rows are worked on by one process after the other, as there are %s; a batch size of at "
                "least the number of processes lets all of them work",
                loader.batch_size,
                self.group.size,
            )
        return deal_loader(loader, self.group, self.shares, self._ledger, f"data loader {self._loaders}")

    def take(self, convert: Callable[[Any], Any], batch: Any) -> Any:
        """A batch comes from its loader. Stands before the host's conversion of its precision."""
        self.rows = self._ledger.of(batch)
        return convert(batch)

    def count(self, own: int) -> None:
        """Learn how many rows all processes have, if user code has dealt them out."""
        if self.rows is None:
            self.rows = Rows(tuple(self.group.gather(own)), self.group.rank)

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

    def check_manual(self) -> None:
        """Refuse manual optimization where some processes have no rows: nobody knows what their step would have done.

        Raises:
            UnsupportedError: On all processes.
        """
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

    def sum_gradients(self) -> None:
        """The gradients of all processes, on all of them."""
        assert self._reducer is not None
        with self.group.answered("in the sum of gradients"):
            self._reducer.finish()
        self._holds_sums = True

    # Exchange

    @property
    def _present(self) -> dist.ProcessGroup | None:
        """The processes that run this step, if some have no rows for it; None: all."""
        if not self._in_step or not self.is_incomplete:
            return None
        assert self.rows is not None
        return self.group.subgroup(tuple(rank for rank, size in enumerate(self.rows.sizes) if size))

    def reduce(self, tensor: Tensor, group: Any, op: Any) -> Tensor:
        """As a strategy's. In a step, only processes with rows take part, and a mean is one over rows."""
        group = self._present if group is None else group
        if not (isinstance(op, str) and op.lower() in ("mean", "avg")):
            chosen = getattr(dist.ReduceOp, op.upper()) if isinstance(op, str) else op
            return self.group.reduce(tensor, dist.ReduceOp.SUM if chosen is None else chosen, group)
        weight = self.weight if self._in_step and self.rows is not None else 1.0 / dist.get_world_size(group)
        wide = tensor if tensor.is_floating_point() else tensor.double()  # a mean of numbers of rows is no whole number
        return self.group.reduce(wide * weight, group=group)

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
