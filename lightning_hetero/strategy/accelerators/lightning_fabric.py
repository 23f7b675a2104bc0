"""For the namespace `lightning.fabric`."""

from __future__ import annotations

from lightning.fabric.accelerators.accelerator import Accelerator

from lightning_hetero._autoload import install
from lightning_hetero.strategy.accelerator import HeteroAcceleratorCore


class HeteroAccelerator(HeteroAcceleratorCore, Accelerator):
    """Devices of any kind, together: `Fabric(accelerator="hetero", devices="cuda:0,cpu", strategy="hetero")`."""

    user = "Fabric"


install()  # completes what `register` had to leave out if the host was imported by this module
