"""What stands in places of Lightning's while a run goes on in several processes, and leaves them as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_hetero.runtime.frames import HERE
from lightning_hetero.strategy._compat import (
    accelerator_connector,
    catch_sigterm,
    logged_results,
    result_collections,
    signal_connector,
)
from lightning_hetero.strategy.step_values import is_one_number
from lightning_hetero.strategy.team import Team


class OwnSamplers:
    """Keeps Lightning from putting its sampler for equal processes into data loaders: the team deals by shares.

    Args:
        trainer: Whose wish not to have its data dealt out is passed on.
        team: The processes.
    """

    def __init__(self, trainer: Any, team: Team) -> None:
        self._connector = accelerator_connector(trainer)
        self._wish = team.data.deals = self._connector.use_distributed_sampler
        self._connector.use_distributed_sampler = False

    def close(self) -> None:
        """Put the user's wish back."""
        self._connector.use_distributed_sampler = self._wish


class QuietSigterm:
    """Ends all processes after the same step when one of them gets SIGTERM.

    Lightning's own handler exchanges a tensor with processes that do not expect it. Here the signal sets a flag only,
    and before each training step the processes learn whether any of them got one.

    Args:
        trainer: Whose handler is replaced, before it registers it.
        team: The processes.
    """

    def __init__(self, trainer: Any, team: Team) -> None:
        self._connector = signal_connector(trainer)
        self._team = team
        self._agrees = trainer.state.fn == "fit"
        self._flag = False
        self._put_back = catch_sigterm(trainer, self._note)

    def agree(self) -> None:
        """A training step begins on all processes."""
        if self._team.agree(self._flag):
            self._connector.received_sigterm = True

    def close(self) -> None:
        """Put Lightning's own back."""
        self._put_back()

    def _note(self, signum: int, frame: Any) -> None:
        self._flag = True
        if not self._agrees:
            self._connector.received_sigterm = True


class TakesBatches:
    """Shows each batch to the team before anything else does; see `SharedData.take`.

    Args:
        plugin: The precision plugin, whose conversion of batches comes first.
        team: The processes.
    """

    def __init__(self, plugin: Any, team: Team) -> None:
        self._plugin = plugin
        plugin.convert_input = partial(team.data.take, plugin.convert_input)

    def close(self) -> None:
        """Leave the plugin as it was."""
        vars(self._plugin).pop("convert_input", None)


class LoggedMetrics:
    """Keeps a metric that some process has never logged from waiting for that one.

    `self.log("name", metric)` computes the metric after the pass, over all processes, but only in those that had a row.

    Args:
        trainer: Has what was logged.
        model: Has the metrics.
        team: The processes.
    """

    def __init__(self, trainer: Any, model: nn.Module, team: Team) -> None:
        self._trainer = trainer
        self._team = team
        self._own = {m: m.distributed_available_fn for m in model.modules() if isinstance(m, Metric)}
        for metric, own in self._own.items():
            metric.distributed_available_fn = _IsDistributed(own, partial(self._check, metric))

    def _check(self, metric: Metric) -> None:
        logged = logged_results(self._trainer)
        if logged is not None and any(result.value is metric for result in logged.values() if not result.is_tensor):
            self._team.check_loop()

    def close(self) -> None:
        """Leave the metrics as they were."""
        for metric, own in self._own.items():
            metric.distributed_available_fn = own


class _IsDistributed:
    """What metrics ask before they join processes, with a check before; a copy of a metric has the own one alone."""

    def __init__(self, own: Callable[[], bool], check: Callable[[], None]) -> None:
        self._own = own
        self._check = check

    def __call__(self) -> bool:
        self._check()
        return self._own()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[], bool]:
        return self._own

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._own,)


def _itself(own: Callable[[], bool]) -> Callable[[], bool]:
    return own


class MeansByRows:
    """Gives a `MeanMetric` that gets one number for a batch the rows as a weight that the number is of.

    On one device such a number counts once for each batch; so those of all processes together have to count once, and
    those of all micro-batches.

    Args:
        trainer: Has what is logged, and so the batch.
        model: Has the metrics.
        team: The processes; None: there is one.
    """

    def __init__(self, trainer: Any, model: nn.Module, team: Team | None) -> None:
        self._trainer = trainer
        self._team = team
        self._is_open = True
        self._own = [(metric, metric.update) for metric in model.modules() if isinstance(metric, MeanMetric)]
        for metric, own in self._own:
            vars(metric)["update"] = partial(self._update, own)

    def _update(self, own: Callable[..., None], value: Any, weight: Any = None) -> None:
        logged = logged_results(self._trainer)
        of_batch = logged is not None and logged.batch is not None
        if self._is_open and of_batch and is_one_number([value], {"weight": weight}):
            weight = (1.0 if self._team is None else self._team.data.weight) * HERE.part_of_batch
        own(value, **({} if weight is None else {"weight": weight}))

    def close(self) -> None:
        """Leave the metrics as they were; one that micro-batches use in turn puts this back, and it does nothing."""
        self._is_open, self._team = False, None
        for metric, own in self._own:
            vars(metric)["update"] = own


class NamedReduction:
    """A strategy's reduction for what is logged under a name. Lightning wants an equal one each time.

    No dataclass, as Lightning would look for tensors in it.

    Args:
        strategy: Whose.
        name: That nothing else has.
    """

    def __init__(self, strategy: Any, name: str) -> None:
        self._strategy = strategy
        self._name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedReduction) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self._name)

    def __call__(self, value: Tensor, group: Any = None, reduce_op: Any = "mean") -> Any:
        """What Lightning calls."""
        return self._strategy.reduce(value, group, reduce_op, self._name)


class LogsByRows:
    """Lets `self.log(..., sync_dist=True)` give means over rows outside of steps too, and never mix two names.

    In hooks of a batch, the rows of a process are those of the batch. In those at the end of an epoch, they are all
    that it had in it; so Lightning takes them for the batch size.

    Args:
        trainer: Has what is logged.
        strategy: Reduces it.
        team: The processes.
    """

    def __init__(self, trainer: Any, strategy: Any, team: Team) -> None:
        self._strategy = strategy
        self._team = team
        self._collections = result_collections(trainer)
        for results in self._collections:
            results.log = partial(self._log, results, results.log)

    def _log(self, results: Any, own: Callable[..., None], fx: str, name: str, value: Any, **options: Any) -> None:
        if options.get("batch_size") is None and fx.endswith("_epoch_end"):
            options["batch_size"] = self._team.data.rows_had or None
        options["sync_dist_fn"] = NamedReduction(self._strategy, f"{fx}/{name}/{results.dataloader_idx}")
        with self._team.logging(of_batch=results.batch is not None):
            own(fx, name, value, **options)

    def close(self) -> None:
        """Leave the collections as they were."""
        for results in self._collections:
            vars(results).pop("log", None)
