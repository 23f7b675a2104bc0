"""Take it away: a trained module as a chain of stages that other runtimes run.

`export` captures the module once, cuts it where the device changes and writes each stage for its target;
`HeteroRuntime` runs the chain. What is in the directory is said by `manifest.json`, which holds no code.
"""

from lightning_hetero.errors import ArtifactError, TargetError
from lightning_hetero.export.chain import HeteroRuntime
from lightning_hetero.export.make import export
from lightning_hetero.export.manifest import Manifest

__all__ = ["ArtifactError", "HeteroRuntime", "Manifest", "TargetError", "export"]
