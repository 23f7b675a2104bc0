"""`ModelParallel`: the same placement for a plain PyTorch loop, without Lightning.

Follows the interface of the article "Heterogeneous computing with PyTorch": a configuration names the model and the
devices, `ModelParallel(config)` is a module to train like any other.
"""

from lightning_hetero.parallel.config import ModelParallelConfig
from lightning_hetero.parallel.module import ModelParallel

__all__ = ["ModelParallel", "ModelParallelConfig"]
