"""What stands in places of Lightning's while a run goes on in several processes, and leaves them as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchmetrics import Metric

from lightning_hetero.strategy._compat import accelerator_connector, catch_sigterm, logged_results, signal_connector
from lightning_hetero.strategy.team import Team


class OwnSamplers:
    """Keeps Lightning from putting its sampler for equal processes into data loaders: the team deals by shares.

    Args:
        trainer: Whose wish not to have its data dealt out is passed on.
        team: The processes.
    """

    def __init__(self, trainer: Any, team: Team) -> None:
        self._connector = accelerator_connector(trainer)
        self._wish = team.deals = self._connector.use_distributed_sampler
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
    """Shows each batch to the team before anything else does; see `Team.take`.

    Args:
        plugin: The precision plugin, whose conversion of batches comes first.
        team: The processes.
    """

    def __init__(self, plugin: Any, team: Team) -> None:
        self._plugin = plugin
        plugin.convert_input = partial(team.take, plugin.convert_input)

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
            metric.distributed_available_fn = partial(self._is_distributed, metric, own)

    def _is_distributed(self, metric: Metric, own: Callable[[], bool]) -> bool:
        logged = logged_results(self._trainer)
        if logged is not None and any(result.value is metric for result in logged.values() if not result.is_tensor):
            self._team.check_loop()
        return own()

    def close(self) -> None:
        """Leave the metrics as they were."""
        for metric, own in self._own.items():
            metric.distributed_available_fn = own
