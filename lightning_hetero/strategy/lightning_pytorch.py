"""Strategy, accelerator, plugins and callback for the namespace `lightning.pytorch`."""

from __future__ import annotations

from lightning.pytorch import plugins
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_hetero.strategy._compat import host
from lightning_hetero.strategy.accelerators.lightning_pytorch import HeteroAccelerator
from lightning_hetero.strategy.checkpoint_files import CheckpointFilesCore
from lightning_hetero.strategy.core import HeteroStrategyCore
from lightning_hetero.strategy.monitor import HeteroMonitorCore
from lightning_hetero.strategy.precision import HeteroMixedPrecisionCore


class MixedPrecision(HeteroMixedPrecisionCore, plugins.MixedPrecision):
    """Mixed precision over several kinds of devices; takes the place of Lightning's plugin by itself.

    It has the same name, because checkpoints hold the state of a plugin under the name of its class.
    """


class HeteroCheckpointIO(CheckpointFilesCore, plugins.TorchCheckpointIO):  # noqa: D101
    __doc__ = CheckpointFilesCore.__doc__


class HeteroStrategy(HeteroStrategyCore, SingleDeviceStrategy):  # noqa: D101
    __doc__ = HeteroStrategyCore.__doc__

    host = host("lightning.pytorch")
    accelerator_class = HeteroAccelerator
    precision_class = MixedPrecision
    checkpoint_io_class = HeteroCheckpointIO


class HeteroMonitor(HeteroMonitorCore, Callback):  # noqa: D101
    __doc__ = HeteroMonitorCore.__doc__
