"""The errors that this package raises on purpose, in one tree.

Every message says what happened, why, and what to do next. Each class is also a `ValueError` or a
`RuntimeError`, so code that knows nothing of this package can still catch it sensibly::

    HeteroError
    ├── InventoryError        ValueError    a device that does not exist, is named twice, or cannot train
    ├── PlacementError        ValueError    a device map or policy that cannot be obeyed
    ├── PlanFileError         ValueError    a plan file that is damaged, foreign, or newer than this package
    ├── ProfileError          ValueError    costs that cannot be, or a profile file that is damaged or foreign
    ├── ScheduleError         ValueError    a schedule, program or timeline that cannot be
    ├── ArtifactError         ValueError    an exported model that is damaged, foreign, unsafe, or newer
    ├── TargetError           RuntimeError  a runtime to export to that is unknown, not here, or cannot take it
    ├── InfeasiblePlanError   RuntimeError  a plan that needs more memory than a device has
    ├── UnsupportedError      RuntimeError  a feature of torch or Lightning that cannot work over several devices
    ├── CheckpointError       RuntimeError  a checkpoint that is damaged, foreign, or cannot be written
    ├── HangError             RuntimeError  a step that does not end
    ├── ProcessError          RuntimeError  another process of the run that went away, or does something else
    └── UsageError            RuntimeError  the parts of this package put together in a way that cannot run
        └── UnknownArgumentError  TypeError  an argument that a class does not have
"""

from __future__ import annotations


class HeteroError(Exception):
    """Base class of all errors of this package."""


class InventoryError(HeteroError, ValueError):
    """A device request that cannot be met: unknown, unavailable, duplicate, ambiguous or empty."""


class PlacementError(HeteroError, ValueError):
    """A device map or placement policy that cannot be obeyed for this model."""


class PlanFileError(HeteroError, ValueError):
    """A plan file that is damaged, not a plan, or written by a newer version of this package."""


class ProfileError(HeteroError, ValueError):
    """Costs that cannot be, or a profile file that is damaged, foreign, or of another model."""


class ScheduleError(HeteroError, ValueError):
    """A schedule that does not exist, a program that cannot be obeyed, or a timeline that cannot have happened."""


class ArtifactError(HeteroError, ValueError):
    """An exported directory that is damaged, foreign, unsafe, or newer than this package."""


class TargetError(HeteroError, RuntimeError):
    """A target of an export that does not exist, is not on this machine, or cannot take what it was given."""


class InfeasiblePlanError(HeteroError, RuntimeError):
    """A plan that needs more memory on some device than the device has."""


class UnsupportedError(HeteroError, RuntimeError):
    """A feature of torch or Lightning that cannot work with parameters on several devices."""


class CheckpointError(HeteroError, RuntimeError):
    """A checkpoint that is damaged or no checkpoint, or that cannot be written."""


class UsageError(HeteroError, RuntimeError):
    """The parts of this package were put together in a way that cannot run."""


class UnknownArgumentError(UsageError, TypeError):
    """An argument that a class of this package does not have; probably misspelt."""


class HangError(HeteroError, RuntimeError):
    """A step over several devices that has not ended within the time that it was given."""


class ProcessError(HeteroError, RuntimeError):
    """Another process of the run went away, does not answer, or does something else than this one."""
