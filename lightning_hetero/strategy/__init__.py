"""Lightning's face: strategy and accelerator, one pair of classes for each of Lightning's two namespaces.

`lightning_hetero.strategy.HeteroStrategy` is the class for the namespace that the program uses: `lightning.pytorch`
if it is imported, else `pytorch_lightning` if that is, else `lightning.pytorch`. The name "hetero" is right in both.
`FabricStrategy` is the one for Fabric, chosen in the same way.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hetero.strategy.accelerators.lightning_pytorch import HeteroAccelerator
    from lightning_hetero.strategy.lightning_fabric import FabricStrategy
    from lightning_hetero.strategy.lightning_pytorch import HeteroMonitor, HeteroStrategy

__all__ = ["FabricStrategy", "HeteroAccelerator", "HeteroMonitor", "HeteroStrategy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_hetero.strategy.register import strategy_module

    return getattr(strategy_module(namespace_in_use(for_fabric=name == "FabricStrategy")), name)


def namespace_in_use(*, for_fabric: bool = False) -> str:
    """The Lightning namespace that this program imported, "lightning.pytorch" or "lightning.fabric" if both or none."""
    both = ("lightning.fabric", "lightning_fabric") if for_fabric else ("lightning.pytorch", "pytorch_lightning")
    return next((namespace for namespace in both if namespace in sys.modules), both[0])
