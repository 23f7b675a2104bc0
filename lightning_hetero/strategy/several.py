"""One of several processes: what Lightning asks of a strategy when a launcher started more than one.

Each process drives devices of its own; all of them train one model, and each gets some of the rows of every batch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.runtime.processes.group import Address, is_one_host
from lightning_hetero.strategy._compat import Host, accumulates, has_trainer, train_loaders, validates_by_the_clock
from lightning_hetero.strategy.balance import Balance
from lightning_hetero.strategy.guests import (
    LoggedMetrics,
    LogsByRows,
    MeansByRows,
    OwnSamplers,
    QuietSigterm,
    TakesBatches,
)
from lightning_hetero.strategy.team import Team

if TYPE_CHECKING:
    from lightning.pytorch.strategies import SingleDeviceStrategy as _Base

else:
    _Base = object

HOW_TO_LAUNCH = (
    "Start one process per machine, for example with `torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d "
    "--rdzv-endpoint=HOST:29500 train.py` on each of them, or as a SLURM job."
)


def address_of(environment: Any, num_nodes: int, variables: Mapping[str, str]) -> Address | None:
    """Where this process and the others of the run meet; None if it is alone.

    Args:
        environment: The cluster environment that Lightning found.
        num_nodes: What the Trainer was told.
        variables: Of the environment.

    Raises:
        UsageError: Several machines or processes are meant, but nothing that Lightning knows launched them.
    """
    size = 1 if environment is None else int(environment.world_size())
    if size > 1:
        return Address(
            rank=environment.global_rank(),
            size=size,
            host=environment.main_address,
            port=environment.main_port,
            one_host=is_one_host(variables, size) or ("LOCAL_WORLD_SIZE" not in variables and num_nodes == 1),
            agent=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=variables.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )
    launched = variables.get("WORLD_SIZE", "1")
    if num_nodes > 1:
        raise UsageError(
            f"Trainer(num_nodes={num_nodes}, strategy='hetero') is the only process: nothing started the others. "
            + HOW_TO_LAUNCH
        )
    if launched.isdigit() and int(launched) > 1 and type(environment).__name__ == "LightningEnvironment":
        raise UsageError(
            f"WORLD_SIZE={launched} says that there are several processes, but no launcher that Lightning knows "
            f"started them, so they cannot find each other. {HOW_TO_LAUNCH} For one process, unset WORLD_SIZE."
        )
    return None


class OneOfSeveralCore(_Base):
    """The part of the strategy that talks to the other processes of the run, if there are any.

    Attributes:
        cluster_environment: Set by Lightning's connector: what the launcher says.
    """

    cluster_environment: Any = None
    host: ClassVar[Host]
    _address: Address | None = None
    _num_nodes = 1
    _shares: tuple[float, ...] = ()
    _team: Team | None = None  # while a run goes on in several processes
    _guests: Sequence[OwnSamplers | TakesBatches | LoggedMetrics | MeansByRows | LogsByRows] = ()
    _sigterm: QuietSigterm | None = None
    _balance: Balance | None = None

    @property
    def num_nodes(self) -> int:
        """What the Trainer was told."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def set_world_ranks(self) -> None:
        """Called by Lightning's connector once it knows the launcher.

        Raises:
            UsageError: Several machines or processes are meant, but nothing launched them.
        """
        self._address = address = address_of(self.cluster_environment, self._num_nodes, os.environ)
        if address is not None:
            self.global_rank, self.world_size = address.rank, address.size
            self.local_rank = int(self.cluster_environment.local_rank())
            self.host.rank_zero_only.rank = address.rank

    @property
    def _place_on_host(self) -> tuple[int, int]:
        """Which of the processes on this machine this one is, and how many there are."""
        environment = self.cluster_environment
        if environment is None or environment.world_size() < 2:
            return 0, 1
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
        index = int(environment.local_rank())
        return index, max(int(here) if here.isdigit() else 1, index + 1)

    @property
    def node_rank(self) -> int:
        """Number of this machine."""
        return 0 if self._address is None else int(self.cluster_environment.node_rank())

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return self._address is None or self._address.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes, so that values can be logged as means over them."""
        return self._address is not None

    # A run

    def _join(self, address: Address, facts: Mapping[str, object], timeout_s: float) -> None:
        """Meet the other processes.

        Raises:
            ProcessError: Some of them did not come.
            UsageError: They differ in what they are to do.
        """
        if self._shares and len(self._shares) != address.size:
            raise UsageError(
                f"shares={list(self._shares)} is for {len(self._shares)} processes, but the launcher started "
                f"{address.size}."
            )
        self._team = Team(address, self._shares, timeout_s, {"shares": list(self._shares), **facts})
        module: Any = self.lightning_module
        self._team.data.training_loaders = partial(train_loaders, module.trainer)
        self._guests = (OwnSamplers(module.trainer, self._team),)  # a hook `setup` may ask for the data already

    def _begin_together(self, team: Team, trainer: Any, model: nn.Module, devices: Sequence[torch.device]) -> None:
        """All processes begin with the same numbers, and stand in the places of Lightning's where they have to."""
        step = getattr(model, "training_step", None)
        if step is not None and "dataloader_iter" in inspect.signature(step).parameters:
            raise UnsupportedError(
                "training_step(dataloader_iter) takes its batches itself, so nobody knows which process has how many "
                "rows. With several processes, write training_step(batch, batch_idx)."
            )
        if validates_by_the_clock(trainer):
            raise UnsupportedError(
                "Trainer(val_check_interval=...) is a time, and with several processes each has a clock of its own: "
                "one would validate while others go on training. Give a number of batches, or a part of an epoch."
            )
        team.adopt(model, devices)
        self._guests = (
            *self._guests,
            TakesBatches(self.precision_plugin, team),
            LoggedMetrics(trainer, model, team),
            MeansByRows(trainer, model, team),
            LogsByRows(trainer, self, team),
        )
        self._sigterm = QuietSigterm(trainer, team)
        self._balance = None if self._shares or not team.data.deals else Balance(team)

    def _dismiss_guests(self) -> None:
        """Leave Lightning's objects as they were."""
        guests, self._guests, sigterm, self._sigterm = self._guests, (), self._sigterm, None
        self._balance = None
        for guest in guests:
            guest.close()
        if sigterm is not None:
            sigterm.close()

    def _part(self) -> None:
        """The run is over on all processes."""
        team, self._team = self._team, None
        if team is not None:
            team.close()

    def _meet(self, team: Team, batch: Any) -> None:
        """What the processes tell each other before a training step."""
        team.release_norms()
        if self._sigterm is not None:
            self._sigterm.agree()
        if team.data.rows is None:
            team.data.count(self.host.extract_batch_size(batch))
        if self._balance is not None:
            module: Any = self.lightning_module
            self._balance.step_begins(train_loaders(module.trainer))

    def on_validation_start(self) -> None:
        """A pass over validation data begins."""
        self._begin_loop("validation")

    def on_validation_end(self) -> None:
        """It is over, and training may go on."""
        if self._team is not None:
            self._team.data.end_loop()

    def on_test_start(self) -> None:
        """A pass over test data begins."""
        self._begin_loop("test")

    def on_predict_start(self) -> None:
        """A pass over data to predict begins."""
        self._begin_loop("prediction")

    def _begin_loop(self, name: str) -> None:
        if self._team is not None:
            self._team.data.begin_loop(name)

    @contextmanager
    def _training_together(self, team: Team, *, in_parts: bool) -> Iterator[bool]:
        """Around a training step; whether this process has no rows for it.

        Args:
            team: The processes.
            in_parts: Whether each micro-batch runs the step of its own.

        Raises:
            UnsupportedError: The step needs what some process does not have.
        """
        module: Any = self.lightning_module
        if not module.automatic_optimization:
            team.check_manual(self.optimizers)
        else:
            if in_parts:  # the backward of each part runs within the step
                team.gradients.hold_sums()
            if not accumulates(module.trainer):
                team.gradients.before_step()
        if in_parts:
            team.check_in_parts()
        with team.step(keeps_norms=module.automatic_optimization):
            yield team.data.is_idle
        team.settle()

    @contextmanager
    def _evaluating_together(self) -> Iterator[bool]:
        """Around a step without gradients; whether this process has no rows for it."""
        if self._team is None:
            yield False
            return
        with self._team.step():
            yield self._team.data.is_idle

    def _weighted_backward(self, team: Team, loss: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's, with sums of gradients before hooks see them."""
        module: Any = self.lightning_module
        automatic = module.automatic_optimization
        team.gradients.hold_sums()
        if not automatic:
            team.gradients.before_step()
        plugin = self.precision_plugin
        self.pre_backward(loss)
        loss = plugin.pre_backward(loss, module) * team.data.weight  # after it: hooks see the loss of the step
        with team.gradients.backward():
            plugin.backward(loss, module, *args, **kwargs)
        if automatic:
            team.release_norms()
        if not automatic or not accumulates(module.trainer):
            team.gradients.sum_gradients()
        loss = plugin.post_backward(loss, module)
        self.post_backward(loss)
        return loss

    # What Lightning exchanges

    @property
    def _listening(self) -> Team | None:
        """The processes, unless this one fails just now: the others do something else then."""
        module: Any = self.lightning_module
        if self._team is None or module is None or not has_trainer(module):
            return self._team
        return None if module.trainer.state.status.value == "interrupted" else self._team

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean", name: str = "") -> Any:
        """Sum, mean or another reduction over the processes.

        A mean within a step weighs each process by its rows of the batch, so that it is that of the whole batch if each
        process gives the mean of its rows.

        Args:
            tensor: Of this process.
            group: Of torch; None: all processes.
            reduce_op: "mean", "sum" and so on, or one of torch's.
            name: Of what is logged; empty if nothing is.
        """
        team = self._listening
        return (
            team.reduce(tensor, group, reduce_op, name) if team is not None and isinstance(tensor, Tensor) else tensor
        )

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all processes, stacked along a new first dimension.

        Raises:
            UnsupportedError: Their shapes differ.
        """
        team = self._listening
        return tensor if team is None else team.all_gather(tensor, group, sync_grads)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes."""
        team = self._listening
        if team is not None:
            team.group.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of one process, on all of them."""
        team = self._listening
        return obj if team is None else team.group.broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes say so, or any."""
        team = self._listening
        if team is None:
            return decision
        said = team.group.gather(bool(decision))
        return False not in said if all else True in said

    def process_dataloader(self, dataloader: Any) -> Any:
        """The data loader of this process, which yields its rows of every batch."""
        return dataloader if self._team is None else self._team.data.dealt(dataloader)

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other processes, so that they end as well."""
        team, self._team = self._team, None
        if team is not None:
            team.fail(exception)
        super().on_exception(exception)
