"""Makes the word "hetero" known to a Lightning namespace, for `strategy=` and for `accelerator=`."""

from __future__ import annotations

import importlib
from typing import Any

NAME = "hetero"
_MODULES = {
    "lightning.pytorch": "lightning_pytorch",
    "pytorch_lightning": "pytorch_lightning",
    "lightning.fabric": "lightning_fabric",
    "lightning_fabric": "standalone_fabric",
}


def strategy_module(namespace: str) -> Any:
    """Our module whose classes derive from those of `namespace`."""
    return importlib.import_module(f"lightning_hetero.strategy.{_MODULES[namespace]}")


def register(namespace: str) -> None:
    """Register strategy and accelerator in one namespace; a second call changes nothing.

    Args:
        namespace: "lightning.pytorch", "lightning.fabric" or their twins; it must be imported already.
    """
    is_fabric = namespace.endswith("fabric")
    name = "FabricStrategy" if is_fabric else "HeteroStrategy"
    registries = (
        ("STRATEGY_REGISTRY", "ACCELERATOR_REGISTRY") if is_fabric else ("StrategyRegistry", "AcceleratorRegistry")
    )
    strategies = getattr(importlib.import_module(f"{namespace}.strategies"), registries[0])
    accelerators = getattr(importlib.import_module(f"{namespace}.accelerators"), registries[1])
    if NAME not in strategies:
        # A function, so that our code is loaded when somebody asks for it and not before.
        strategies.register(
            NAME,
            lambda **options: getattr(strategy_module(namespace), name)(**options),
            description="Places the model over all devices of this machine",
        )
    # The host looks into classes of all accelerators when one of them is not available, so no function here. The
    # class is missing while its module is being imported, which imports the host; the module's last line calls again.
    module = importlib.import_module(f"lightning_hetero.strategy.accelerators.{_MODULES[namespace]}")
    accelerator = getattr(module, "HeteroAccelerator", None)
    if NAME not in accelerators and accelerator is not None:
        accelerators.register(NAME, accelerator, description="Devices of any kind, together")
