"""What stands in places of Lightning's while a run goes on in several processes, and leaves them as they were."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_hetero.strategy.team import Team


class OwnSamplers:
    """Keeps Lightning from putting its sampler for equal processes into data loaders: the team deals by shares.

    Args:
        trainer: Whose wish not to have its data dealt out is passed on.
        team: The processes.
    """

    def __init__(self, trainer: Any, team: Team) -> None:
        self._connector = trainer._accelerator_connector
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
        self._connector = trainer._signal_connector
        self._loop = trainer.fit_loop.epoch_loop
        self._team = team
        self._agrees = trainer.state.fn == "fit"
        self._flag = False
        self._connector._sigterm_notifier_fn = self._note
        if hasattr(type(self._loop), "_broadcast_sigterm_tensor"):
            self._loop._broadcast_sigterm_tensor = lambda: None

    def agree(self) -> None:
        """A training step begins on all processes."""
        if self._team.agree(self._flag):
            self._connector.received_sigterm = True

    def close(self) -> None:
        """Put Lightning's own back."""
        vars(self._connector).pop("_sigterm_notifier_fn", None)
        vars(self._loop).pop("_broadcast_sigterm_tensor", None)

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
