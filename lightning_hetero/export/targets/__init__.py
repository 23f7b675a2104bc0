"""Where a stage can run: one file per family of targets. A target is written `family:device`."""

from lightning_hetero.export.targets.target import Run, Saved, StageProgram, Target, family_names, find_target, opens

__all__ = ["Run", "Saved", "StageProgram", "Target", "family_names", "find_target", "opens"]
