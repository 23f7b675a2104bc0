"""One job of `train`: alone it may fail aloud; in a sweep it leaves a row, and the sweep goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lightning_hetero.cli import job
from lightning_hetero.cli.sweep_row import SweepRow, failed

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROWS = "sweep_rows"
"""Folder of the rows, in that of the sweep."""


def run(cfg: DictConfig) -> float | None:
    """Train as `job.run` does.

    Returns:
        The metric called `cfg.optimized_metric`, for a sweeper; None if that is null, and for a job of a sweep that
        failed.

    Raises:
        Exception: Outside of sweeps, what `job.run` raises.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return job.run(cfg).metric
    row = SweepRow(
        job=int(hydra.job.num), overrides=[*map(str, hydra.overrides.task)], metric_name=cfg.get("optimized_metric")
    )
    try:
        finished = job.run(cfg)
    except Exception as error:
        failed(row, error, "train")
    else:
        row.metric = finished.metric
        from lightning_hetero.cli.forecast import forecast_of  # torch, which --help should not wait for

        row.take(finished.clock, forecast_of(cfg, finished.clock))
    row.write(rows_folder(hydra))
    return row.metric


def rows_folder(hydra: Any) -> Path:
    """Where the jobs of a sweep leave their rows, whatever the current directory is."""
    return Path(str(hydra.runtime.cwd), str(hydra.sweep.dir), ROWS)
