"""For the namespace `pytorch_lightning`."""

from __future__ import annotations

from pytorch_lightning.accelerators import Accelerator

from lightning_hetero._autoload import install
from lightning_hetero.strategy.accelerator import HeteroAcceleratorCore


class HeteroAccelerator(HeteroAcceleratorCore, Accelerator):
    """Devices of any kind, together: `Trainer(accelerator="hetero", devices="cuda:0,cpu", strategy="hetero")`."""


install()  # completes what `register` had to leave out if the host was imported by this module
