"""Strategy, accelerator and precision plugin of Fabric for the namespace `lightning_fabric`."""

from __future__ import annotations

from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.strategies.single_device import SingleDeviceStrategy

from lightning_hetero.strategy._compat import fabric_host
from lightning_hetero.strategy.accelerators.standalone_fabric import HeteroAccelerator
from lightning_hetero.strategy.checkpoint_files import CheckpointFilesCore
from lightning_hetero.strategy.fabric import FabricStrategyCore
from lightning_hetero.strategy.precision import HeteroMixedPrecisionCore


class HeteroMixedPrecision(HeteroMixedPrecisionCore, MixedPrecision):
    """Mixed precision over several kinds of devices; takes the place of Lightning's plugin by itself."""


class HeteroCheckpointIO(CheckpointFilesCore, TorchCheckpointIO):  # noqa: D101
    __doc__ = CheckpointFilesCore.__doc__


class FabricStrategy(FabricStrategyCore, SingleDeviceStrategy):  # noqa: D101
    __doc__ = FabricStrategyCore.__doc__

    host = fabric_host("lightning_fabric")
    accelerator_class = HeteroAccelerator
    precision_class = HeteroMixedPrecision
    checkpoint_io_class = HeteroCheckpointIO
