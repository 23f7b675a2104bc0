"""CPU time of `strategy="hetero"` in connected mode against plain Lightning, as ratios within one run.

    python benchmarks/connected_overhead.py
    python benchmarks/connected_overhead.py --quick

Everything that costs the same with both strategies is switched off and the model is small, which makes a step short
and the ratios as bad as they get.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lockstep import side_by_side, steps_needed
from report import is_quick, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroStrategy
from lightning_hetero.testing import install_accelerator

STEPS, QUICK_STEPS = 300, 20
ROWS = 32
WIDTH = 64
LAYERS = 8
NOTHING_ELSE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

TrainerOptions = Callable[[], dict[str, Any]]


class Perceptron(pl.LightningModule):
    """`LAYERS` linear layers of `WIDTH`, each with its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, the cheapest."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def plain() -> dict[str, Any]:
    return {"accelerator": "cpu", "strategy": "auto"}


def default() -> dict[str, Any]:
    return {"strategy": "hetero"}


def connected(devices: str | list[str], placement: str | dict[str, str | int]) -> dict[str, Any]:
    return {"strategy": HeteroStrategy(devices=devices, placement=placement, micro_batches=1, verbose=False)}


def single() -> dict[str, Any]:
    return connected("cpu", "single")


def placed(devices: list[str]) -> TrainerOptions:
    """Layer i on device i of the list, the CPU being the root."""
    return lambda: connected(sorted(set(devices)), {f"net.{layer}": device for layer, device in enumerate(devices)})


def measure(variants: Mapping[str, TrainerOptions], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds per step of every turn of every round, of so many steps; each has new models and Trainers."""
    steps = steps_needed(steps)
    rows = TensorDataset(torch.randn(steps * ROWS, WIDTH), torch.randint(WIDTH, (steps * ROWS,)))

    def fit(options: TrainerOptions) -> Callable[[pl.Callback], None]:
        def run(stopwatch: pl.Callback) -> None:
            trainer = pl.Trainer(max_steps=steps, callbacks=[stopwatch], **NOTHING_ELSE, **options())
            trainer.fit(Perceptron(), DataLoader(rows, batch_size=ROWS))

        return run

    step_s: dict[str, list[float]] = defaultdict(list)
    order = list(variants)
    for seed in range(rounds):
        for name, seconds in side_by_side({name: fit(variants[name]) for name in order}, seed).items():
            step_s[name] += seconds
        order = [*order[1:], order[0]]  # who is set up first finds memory in another state than who comes last
    return step_s


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over all laps of the ratio within the lap, whose turns are a few milliseconds apart."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def overhead(rounds: int, steps: int) -> dict[str, float]:
    """Everything on one device. Plain Lightning runs twice: its ratio to itself tells what noise is left."""
    step_s = measure({"plain": plain, "again": plain, "default": default, "single": single}, rounds, steps)
    return {
        "plain_us": statistics.median(step_s["plain"]) * 1e6,
        "noise_ratio": ratio(step_s["again"], step_s["plain"]),
        "default_ratio": ratio(step_s["default"], step_s["plain"]),
        "single_ratio": ratio(step_s["single"], step_s["plain"]),
    }


def border_cost(rounds: int, steps: int) -> dict[str, float]:
    """The same layers on the CPU and on an emulated accelerator, with few borders and with many."""
    accelerator = install_accelerator().devices[0]
    few = ["cpu"] * (LAYERS // 2) + [accelerator] * (LAYERS // 2)
    many = ["cpu", accelerator] * (LAYERS // 2)
    step_s = measure({"plain": plain, "few": placed(few), "many": placed(many)}, rounds, steps)
    more_s = statistics.median(a - b for a, b in zip(step_s["many"], step_s["few"], strict=True))
    return {
        "two_stages_ratio": ratio(step_s["few"], step_s["plain"]),
        "border_us": more_s / (borders(many) - borders(few)) * 1e6,
    }


def borders(devices: list[str]) -> int:
    """How often a batch changes its device between the root, all layers and the root."""
    return sum(before != after for before, after in pairwise(["cpu", *devices, "cpu"]))


def main() -> None:
    quick = is_quick(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("The 'train_dataloader' does not have many workers", r"`isinstance\(treespec, LeafSpec\)`"):
        warnings.filterwarnings("ignore", message=advice)
    torch.set_num_threads(1)
    # In this order: once it is installed, the accelerator belongs to the devices that "hetero" finds by itself.
    steps = QUICK_STEPS if quick else STEPS
    report({**overhead(1 if quick else 24, steps), **border_cost(1 if quick else 12, steps)})


if __name__ == "__main__":
    main()
