"""One training job: a composed configuration to trained weights and test metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from lightning_hetero.cli.arguments import check_arguments
from lightning_hetero.cli.explain import near
from lightning_hetero.config import check_groups
from lightning_hetero.errors import UsageError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from omegaconf import DictConfig

    from lightning_hetero.cli.step_clock import StepClock

STEP_S = "hetero/step_s"
SAMPLES_PER_S = "hetero/samples_per_s"
"""Metrics of every job that took more than three steps, for sweeps that look for speed."""


@dataclass(frozen=True)
class Finished:
    """What a job came to.

    Attributes:
        metric: The metric called `optimized_metric`; None if that is null.
        clock: What its steps took.
    """

    metric: float | None
    clock: StepClock


def run(cfg: DictConfig) -> Finished:
    """Train, validating on the way, then test with the best weights that were kept and print the result.

    Args:
        cfg: The configuration `train`, composed by Hydra.

    Raises:
        HeteroError: The configuration means nothing, cannot be obeyed, or names a metric that nobody logs.
    """
    with _lines_once():
        return _run(cfg)


def run_steps(cfg: DictConfig, steps: int) -> StepClock:
    """Train until so many steps were measured, and do nothing else.

    Args:
        cfg: The same, with a Trainer that goes on for long enough.
        steps: How many, at most 50.

    Raises:
        HeteroError: The configuration means nothing, or cannot be obeyed.
    """
    with _lines_once():
        model, data, trainer, clock = _prepared(cfg, steps)
        trainer.fit(model, datamodule=data)
        return clock


def _prepared(
    cfg: DictConfig, stop_after: int | None = None
) -> tuple[LightningModule, LightningDataModule, Trainer, StepClock]:
    from lightning_hetero.cli.step_clock import StepClock  # torch, which --help should not wait for

    check_groups(cfg)
    for group in ("data", "model", "trainer"):
        check_arguments(group, cfg[group])
    _seed(cfg.seed)
    data: LightningDataModule = instantiate(cfg.data, _convert_="all")
    model: LightningModule = instantiate(cfg.model, _convert_="all")
    trainer: Trainer = instantiate(cfg.trainer)
    return model, data, trainer, StepClock.of(trainer, stop_after)


def _run(cfg: DictConfig) -> Finished:
    model, data, trainer, clock = _prepared(cfg)
    trainer.fit(model, datamodule=data)
    metrics = _numbers(trainer.callback_metrics) | _best(trainer) | _speed(clock)
    trainer.test(model, datamodule=data, ckpt_path=_best_weights(trainer), verbose=False)
    tested = _numbers(trainer.callback_metrics)
    for name, value in tested.items():
        print(f"{name} {value:.4f}")
    return Finished(_chosen(cfg.optimized_metric, metrics | tested), clock)


@contextmanager
def _lines_once() -> Iterator[None]:
    """Keep Lightning from printing each line of log that Hydra's handlers print and store already."""
    import lightning.pytorch  # noqa: F401 (adds the handlers)

    logger = logging.getLogger("lightning")
    handlers, logger.handlers[:] = logger.handlers[:], []
    try:
        yield
    finally:
        logger.handlers[:] = handlers


def _seed(seed: Any) -> None:
    from lightning.pytorch import seed_everything

    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise UsageError(
            f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}, or null for another one every time"
        )

    # Lightning would take the seed of the job before from here, in a sweep whose jobs share a process.
    os.environ.pop("PL_GLOBAL_SEED", None)
    if seed is not None:
        seed_everything(seed, workers=True, verbose=False)


def _numbers(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(metrics.items())}


def _speed(clock: StepClock) -> dict[str, float]:
    found = {STEP_S: clock.step_s, SAMPLES_PER_S: clock.samples_per_s}
    return {name: value for name, value in found.items() if value is not None}


def _best(trainer: Trainer) -> dict[str, float]:
    """The metric by which the best weights were chosen: theirs, not that of the last epoch."""
    keeper: Any = trainer.checkpoint_callback
    monitor, score = getattr(keeper, "monitor", None), getattr(keeper, "best_model_score", None)
    return {} if monitor is None or score is None else {monitor: float(score)}


def _best_weights(trainer: Trainer) -> str | None:
    """File of the best weights; None stands for those that training ended with."""
    return getattr(trainer.checkpoint_callback, "best_model_path", None) or None


def _chosen(name: str | None, metrics: dict[str, float]) -> float | None:
    if name is None:
        return None
    if str(name) not in metrics:
        raise UsageError(
            f"optimized_metric={name!r} is not among the metrics that the model logged: "
            f"{', '.join(metrics) or 'none'}.{near(str(name), metrics)} Set it to one of them, or to null."
        )
    return metrics[name]
