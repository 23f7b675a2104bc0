"""Take it away: a trained module as a chain of stages that other runtimes run.

`plan_deployment` decides what is to run where; `export` captures the module once, cuts it where the device changes
and writes each stage for its target; `HeteroRuntime` runs the chain. What is in the directory is said by
`manifest.json`, which holds no code.
"""

import sys
from types import ModuleType
from typing import Any

from lightning_hetero.errors import ArtifactError, TargetError
from lightning_hetero.export.chain import HeteroRuntime
from lightning_hetero.export.deploy import plan_deployment
from lightning_hetero.export.make import export
from lightning_hetero.export.manifest import Manifest

__all__ = ["ArtifactError", "HeteroRuntime", "Manifest", "TargetError", "export", "plan_deployment"]


class _Called(ModuleType):
    """This package, so that `lightning_hetero.export(model, ...)` is `lightning_hetero.export.export(model, ...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Manifest:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Called
