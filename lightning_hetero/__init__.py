"""Train any PyTorch Lightning project on every processor its owner has: `Trainer(strategy="hetero")`.

A map of the package, in the order in which things happen; a name never imports one below it::

    errors, units   what can go wrong; sizes such as "24GiB"
    devices/        what we have: the inventory, its discovery, emulated devices
    graph/          what we run: the units of a model and the tensors between them
    profile/        what it costs: seconds and bytes of each unit on each device
    schedule/       in what order: rules for micro-batches, and the timeline
    plan/           who does what: the plan, its file, its explanation
    simulate/       how long it will take
    placement/      who decides: one file per policy
    runtime/        do it
    export/         take it away: the stages for other runtimes
    parallel/       all of it for a plain training loop: `ModelParallel`
    strategy/       all of it for Lightning: `HeteroStrategy`, and `FabricStrategy` for its Fabric
    config, cli     all of it from the command line, through Hydra

    testing/        helpers for people who write policies, schedules and device backends
    demos/          small Lightning projects that know nothing of this package

The names in `__all__` are the public interface; nothing else is promised. They are imported when they are
first used, so `import lightning_hetero` costs next to nothing and does not import torch. What it does do is
to make `strategy="hetero"` known to Lightning, whether that is imported before or after.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_hetero._autoload import install as _install_hook

if TYPE_CHECKING:
    from lightning_hetero.devices import DeviceSpec, Inventory, discover, resolve_devices
    from lightning_hetero.errors import (
        HeteroError,
        InfeasiblePlanError,
        InventoryError,
        PlacementError,
        UnsupportedError,
    )
    from lightning_hetero.export import HeteroRuntime, export, plan_deployment
    from lightning_hetero.parallel import ModelParallel, ModelParallelConfig
    from lightning_hetero.placement import PlacementPolicy, register_policy
    from lightning_hetero.plan import Plan, Stage
    from lightning_hetero.strategy import FabricStrategy, HeteroAccelerator, HeteroMonitor, HeteroStrategy

__version__ = "0.1.0"

__all__ = [
    "DeviceSpec",
    "FabricStrategy",
    "HeteroAccelerator",
    "HeteroError",
    "HeteroMonitor",
    "HeteroRuntime",
    "HeteroStrategy",
    "InfeasiblePlanError",
    "Inventory",
    "InventoryError",
    "ModelParallel",
    "ModelParallelConfig",
    "PlacementError",
    "PlacementPolicy",
    "Plan",
    "Stage",
    "UnsupportedError",
    "__version__",
    "discover",
    "export",
    "plan_deployment",
    "register_policy",
    "resolve_devices",
]

_HOMES = {
    "devices": ("DeviceSpec", "Inventory", "discover", "resolve_devices"),
    "errors": ("HeteroError", "InfeasiblePlanError", "InventoryError", "PlacementError", "UnsupportedError"),
    "export": ("HeteroRuntime", "export", "plan_deployment"),
    "parallel": ("ModelParallel", "ModelParallelConfig"),
    "placement": ("PlacementPolicy", "register_policy"),
    "plan": ("Plan", "Stage"),
    "strategy": ("FabricStrategy", "HeteroAccelerator", "HeteroMonitor", "HeteroStrategy"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    # Not kept in this module: which HeteroStrategy is meant depends on the Lightning that is loaded by then.
    if name == "export":  # a package and a function; the package is called as the function is
        return import_module(_HOME_OF[name])
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install_hook()
