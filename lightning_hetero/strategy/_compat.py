"""The one place for names that Lightning does not promise to keep, looked up in the namespace of the host.

`lightning.pytorch` and `pytorch_lightning` are two copies of one library that do not know each other. What is taken
from the host has to come from the very copy whose Trainer runs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Columns = list[tuple[str, list[str]]]

NAMESPACES = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}

TESTED = ("2.4.0", "2.5.6", "2.6.0", "2.6.6")
"""The releases of Lightning that `.ci/versions` tries, oldest first; docs/versions.md has what came of it."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What Trainer and Fabric have in common.

    Attributes:
        namespace: The package whose classes ours derive from.
    """

    namespace: str

    def warn_if_untested(self) -> None:
        """Warn of a Lightning with another minor version than all that were tried; a newer patch is no news."""
        from packaging.version import Version  # comes with Lightning

        version = Version(importlib.import_module(self.namespace).__version__)
        newest = Version(TESTED[-1])
        if version.release[:2] > newest.release[:2]:
            distribution = self.namespace.partition(".")[0].replace("_", "-")
            warnings.warn(
                f"{self.namespace} {version} is newer than {newest}, the newest Lightning that lightning_hetero was "
                "tested with. It may well work. If it does not, go back: "
                f"pip install '{distribution}<{newest.major}.{newest.minor + 1}'",
                stacklevel=3,
            )


@dataclass(frozen=True, slots=True)
class Host(Copy):
    """One copy of Lightning: "lightning.pytorch" or "pytorch_lightning".

    Attributes:
        update_properties: Sets `self.device` of a LightningModule without moving it.
        empty_init: Context manager that skips the filling of new parameters.
        mixed_precision: Its class of that name.
        backward: That of its class `Strategy`.
        rank_zero_only: Lets a function run in process 0 only; its `rank` says which process this is.
        extract_batch_size: Finds out how many rows a batch has.
        cpu_stats: Load and memory of the machine in per cent, by Lightning's names.
    """

    update_properties: Callable[..., None]
    empty_init: Callable[..., Any]
    mixed_precision: type[Any]
    backward: Callable[..., Any]
    rank_zero_only: Any
    extract_batch_size: Callable[[Any], int]
    cpu_stats: Callable[[], dict[str, float]]


def host(namespace: str) -> Host:
    """Look the names up.

    Args:
        namespace: "lightning.pytorch" or "pytorch_lightning".
    """
    fabric = NAMESPACES[namespace]
    return Host(
        namespace=namespace,
        update_properties=importlib.import_module(f"{fabric}.utilities.device_dtype_mixin")._update_properties,
        empty_init=importlib.import_module(f"{fabric}.utilities.init")._EmptyInit,
        mixed_precision=importlib.import_module(f"{namespace}.plugins").MixedPrecision,
        backward=importlib.import_module(f"{namespace}.strategies").Strategy.backward,
        rank_zero_only=importlib.import_module(f"{namespace}.utilities.rank_zero").rank_zero_only,
        extract_batch_size=importlib.import_module(f"{namespace}.utilities.data").extract_batch_size,
        cpu_stats=partial(_cpu_stats, namespace),
    )


def _cpu_stats(namespace: str) -> dict[str, float]:
    """Looked up anew at each call: tests put a mock there."""
    stats: dict[str, float] = importlib.import_module(f"{namespace}.accelerators.cpu").get_cpu_stats()
    return stats


@dataclass(frozen=True, slots=True)
class FabricHost(Copy):
    """One copy of Fabric: "lightning.fabric" or "lightning_fabric".

    Attributes:
        empty_init: Context manager that skips the filling of new parameters.
        mixed_precision: Its class of that name.
        unwrap: From what Fabric made of a module or optimizer to what the user had given, in collections too.
    """

    empty_init: Callable[..., Any]
    mixed_precision: type[Any]
    unwrap: Callable[[Any], Any]


def fabric_host(namespace: str) -> FabricHost:
    """Look the names up.

    Args:
        namespace: "lightning.fabric" or "lightning_fabric".
    """
    return FabricHost(
        namespace=namespace,
        empty_init=importlib.import_module(f"{namespace}.utilities.init")._EmptyInit,
        mixed_precision=importlib.import_module(f"{namespace}.plugins").MixedPrecision,
        unwrap=importlib.import_module(f"{namespace}.wrappers")._unwrap_objects,
    )


# Of objects that are the host's already, whichever copy it is.


def accelerator_connector(trainer: Any) -> Any:
    """What has the user's `use_distributed_sampler`."""
    return trainer._accelerator_connector


def signal_connector(trainer: Any) -> Any:
    """What has `received_sigterm`, which ends a run after the step."""
    return trainer._signal_connector


def catch_sigterm(trainer: Any, handler: Callable[[int, Any], None]) -> Callable[[], None]:
    """Put a handler in the place of Lightning's, before that is registered.

    Returns:
        A function that puts Lightning's back.
    """
    connector, loop = signal_connector(trainer), trainer.fit_loop.epoch_loop
    connector._sigterm_notifier_fn = handler
    if hasattr(type(loop), "_broadcast_sigterm_tensor"):  # since 2.5: asks all processes before each step
        loop._broadcast_sigterm_tensor = lambda: None

    def put_back() -> None:
        vars(connector).pop("_sigterm_notifier_fn", None)
        vars(loop).pop("_broadcast_sigterm_tensor", None)

    return put_back


def logged_results(trainer: Any) -> Any:
    """What `self.log` has collected in the loop that runs, or None."""
    return trainer._results


def result_collections(trainer: Any) -> list[Any]:
    """What `self.log` collects in, in every loop that has it."""
    epoch_loop = trainer.fit_loop.epoch_loop
    loops = (epoch_loop, epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    return [loop._results for loop in loops]


def steps_taken(trainer: Any) -> int:
    """The number under which the Trainer's own metrics of a training step go to the loggers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def has_trainer(module: Any) -> bool:
    """Whether a LightningModule is in a run; `module.trainer` raises if not."""
    return module._trainer is not None


def train_loaders(trainer: Any) -> Any:
    """The data loaders of the training, in a list whatever the user's collection was; none before they are made."""
    combined = trainer.fit_loop._combined_loader
    return () if combined is None else combined.flattened


def accumulates(trainer: Any) -> bool:
    """Whether this training step only adds to the gradients."""
    return bool(trainer.fit_loop._should_accumulate())


def validates_by_the_clock(trainer: Any) -> bool:
    """Whether `val_check_interval` is a time, which Lightning 2.6 brought."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def prunes_globally(callback: Any) -> bool:
    """Whether a callback is a `ModelPruning` that ranks the weights of all layers together."""
    return bool(getattr(callback, "_use_global_unstructured", False)) and hasattr(callback, "apply_pruning")


def averaged_copy(callback: Any, root: Any) -> tuple[Any, Any] | None:
    """The copy of the model that a callback averages weights in, and the device that it is for; None without one.

    Args:
        callback: Any.
        root: Where the copy is if the callback does not say.
    """
    copy = getattr(callback, "_average_model", None)
    return None if copy is None else (copy, getattr(callback, "_device", None) or root)


def has_own_table(callback: Any) -> bool:
    """Whether a `ModelSummary` is one of a user that makes or prints its table in another way than Lightning's."""
    modules = ("callbacks.model_summary", "callbacks.rich_model_summary")
    methods = [getattr(type(callback), name, None) for name in ("_summary", "summarize")]
    return not all(getattr(method, "__module__", "").endswith(modules) for method in methods)


def alter_tables(callback: Any, alter: Callable[[Any, Columns], Columns]) -> Callable[[], None]:
    """Change the columns of the table that a `ModelSummary` prints.

    Args:
        callback: The ModelSummary.
        alter: From a summary, which has `named_modules`, and its titled columns to other columns.

    Returns:
        A function that lets it print its own table again.
    """
    make = callback._summary

    def altered(trainer: Any, module: Any) -> Any:
        summary = make(trainer, module)
        own = summary._get_summary_data
        summary._get_summary_data = lambda: alter(summary, own())
        return summary

    callback._summary = altered
    return lambda: vars(callback).pop("_summary", None)


def wants_no_cpu_stats(callback: Any) -> bool:
    """Whether this is a `DeviceStatsMonitor(cpu_stats=False)`."""
    return getattr(callback, "_cpu_stats", None) is False


@dataclass
class TorchProfilerOptions:
    """What a `PyTorchProfiler` does once it starts, to be changed before that.

    Attributes:
        profiler: It.
        arguments: Of `torch.profiler.profile`.
    """

    profiler: Any
    arguments: dict[str, Any]

    @classmethod
    def of(cls, profiler: Any) -> TorchProfilerOptions | None:
        """Those of a profiler of a Trainer; None if it is of another kind."""
        arguments = getattr(profiler, "_profiler_kwargs", None)
        return cls(profiler, arguments) if isinstance(arguments, dict) else None

    def configure(self, config: Any) -> Callable[[], None] | None:
        """Give torch's profiler an `experimental_config`; one that has been made already takes it when it starts.

        Returns:
            A function that takes it away again; None if the user has given one.
        """
        if "experimental_config" in self.arguments:
            return None
        self.arguments["experimental_config"] = config
        if self.profiler.profiler is not None:
            self.profiler.profiler.experimental_config = config
        return partial(self.arguments.pop, "experimental_config", None)

    def forgo_module_names(self) -> Callable[[], None] | None:
        """Take the hooks that name modules off, and put none on any more.

        Returns:
            A function that lets the profiler put them on again in its next run; None if it did not want any.
        """
        if not getattr(self.profiler, "_record_module_names", False):
            return None
        self.profiler._record_module_names = False
        if self.profiler._register is not None:
            self.profiler._register.__exit__(None, None, None)
            self.profiler._register = None
        return partial(setattr, self.profiler, "_record_module_names", True)


def remove_when_written(checkpoint_io: Any, path: Any) -> bool:
    """Let an `AsyncCheckpointIO` remove a file after it has written those that it was given before.

    Returns:
        False, with nothing done, if this plugin does not write in the background.
    """
    executor = getattr(checkpoint_io, "_executor", None)
    if executor is None:
        return False

    def remove() -> None:
        try:
            if checkpoint_io._error is None:
                checkpoint_io.remove_checkpoint(path)
        except Exception as error:
            checkpoint_io._error = error  # raised with the next save, or at the end

    executor.submit(remove)
    return True
