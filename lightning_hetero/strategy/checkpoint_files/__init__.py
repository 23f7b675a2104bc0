"""Checkpoint files that survive: written whole or not at all, and found out when a bit of them has changed."""

from lightning_hetero.strategy.checkpoint_files.checkpoint_io import CheckpointFilesCore
from lightning_hetero.strategy.checkpoint_files.seal import BrokenSealError, is_sealed, save_sealed

__all__ = ["BrokenSealError", "CheckpointFilesCore", "is_sealed", "save_sealed"]
