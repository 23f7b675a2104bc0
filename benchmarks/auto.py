"""Whether `auto` is as fast as the best policy that a user could have chosen, with the real Trainer.

    python benchmarks/auto.py
    python benchmarks/auto.py --quick

Models (MLP, convnet, transformer) on two unequal devices that the CPU plays, both so slow that they sleep most of the
time, as devices of their own would leave the CPU alone. Every policy trains with `profile="always"` until its plan
stays; the plans that came out train then in turns, as plan files, and each counts as fast as the median over the turns
of its fastest step. Policies that came to the same plan share its time. A ratio is the time of the plan of `auto` by
that of the fastest other plan.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from prediction import MODELS
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero import HeteroStrategy
from lightning_hetero.graph.find import find_units
from lightning_hetero.plan import Plan
from lightning_hetero.strategy.trial import WARM_CUT, in_effect, name_of

# The third one is used by no plan: the others are as slow as they are because it is so fast.
DEVICES, FORBIDDEN = "cpu@speed=4,cpu@speed=3,cpu@speed=16", "emulated:2"
POLICIES = (
    "single", "even", "memory_first", "proportional", "exact", "dag", "heft", "interleaved", "replicate", "hybrid",
    "halves",
)  # fmt: skip
QUICK_POLICIES = ("single", "even")
STEPS, QUICK_STEPS = 42, 10
PLANNED = 150  # steps of the run, as far as the strategy knows, so that it may try plans as long as it likes
TURNS, TURN_STEPS, QUICK_TURN_STEPS = 5, 6, 1
QUICK_PROFILED = "mlp"  # the only model that a quick run measures


class Classifier(pl.LightningModule):
    """A model of `MODELS` that sorts its inputs into ten classes, and when its steps began.

    Args:
        name: Of the model.
        steps: When it stops training.
    """

    def __init__(self, name: str, steps: int = 0) -> None:
        super().__init__()
        self.steps = steps
        torch.manual_seed(0)
        self.net: nn.Module = MODELS[name][0]()
        self.begun_s: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:  # noqa: D102
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def on_train_batch_start(self, batch: Any, index: int) -> None:  # noqa: D102
        self.begun_s.append(time.perf_counter())

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:  # noqa: D102
        self.trainer.should_stop = index + 1 == self.steps

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.Adam(self.parameters())


def train(name: str, steps: int, **options: Any) -> tuple[Plan, list[float]]:
    """Train a model for some steps. The plan in the end, and seconds from each step to the next one."""
    module = Classifier(name, steps)
    x = torch.cat([MODELS[name][1](), MODELS[name][1]()])
    batch = x, torch.randint(10, (len(x),))
    strategy = HeteroStrategy(verbose=False, **options)
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=PLANNED,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([*islice(cycle([batch]), PLANNED)], batch_size=None))
    assert strategy.plan is not None
    return strategy.plan, [end_s - begin_s for begin_s, end_s in zip(module.begun_s, module.begun_s[1:], strict=False)]


def placement(policy: str, name: str) -> str | dict[str, str | int]:
    """What the strategy is given; for "halves", the first half of the units by hand on the faster device."""
    if policy != "halves":
        return policy
    names = find_units(Classifier(name)).names
    return {unit: f"emulated:{0 if spot < len(names) // 2 else 1}" for spot, unit in enumerate(names)}


def compare(name: str, folder: Path, quick: bool) -> tuple[float, float]:
    """The time of `auto` by that of the fastest policy, and the fastest plan's slowest by its fastest turn."""
    options: dict[str, Any] = {"devices": DEVICES, "constraints": {"forbidden": [FORBIDDEN]}}
    plans: dict[str, Plan] = {}
    for policy in ("auto", *(QUICK_POLICIES if quick else POLICIES)):
        profile = "never" if quick and name != QUICK_PROFILED else "always"
        steps = 2 if profile == "never" else QUICK_STEPS if quick else STEPS
        plans[policy], _ = train(name, steps, placement=placement(policy, name), profile=profile, **options)
    of_plan: dict[str, list[float]] = {}
    for plan in plans.values():
        of_plan.setdefault(repr(in_effect(plan)), [])
    for _ in range(1 if quick else TURNS):
        for effect, turns in of_plan.items():
            plan = next(plan for plan in plans.values() if repr(in_effect(plan)) == effect)
            file = folder / "plan.json"
            file.write_text(plan.to_json())
            steps = WARM_CUT + (QUICK_TURN_STEPS if quick else TURN_STEPS)
            _, seconds = train(name, steps + 1, plan=file, profile="never", **options)
            turns.append(min(seconds[WARM_CUT:]))
    step_s = {policy: statistics.median(of_plan[repr(in_effect(plan))]) for policy, plan in plans.items()}
    show(name, plans, step_s)
    fastest = min(of_plan.values(), key=statistics.median)
    others = [seconds for policy, seconds in step_s.items() if policy != "auto"]
    return step_s["auto"] / min(others), max(fastest) / min(fastest)


def show(name: str, plans: Mapping[str, Plan], step_s: Mapping[str, float]) -> None:
    """A line for each policy, and why `auto` chose as it did."""
    for policy, plan in plans.items():
        print(f"{name:<12}{policy:<14}{step_s[policy] * 1e3:8.1f} ms  {name_of(plan)}")
    for note in plans["auto"].notes:
        print(f"{'':<12}{note}")


def cpu_only() -> float:
    """On how many devices `auto` trains where there is nothing but a CPU."""
    plan, _ = train("mlp", 4, devices="cpu", placement="auto", profile="always")
    print(*plan.notes)
    return float(len(plan.used))


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    noises = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for name in MODELS:
            figures[f"{name}_ratio"], noise = compare(name, Path(folder), quick)
            noises.append(noise)
        figures["noise_ratio"] = max(noises)
        figures["cpu_only_devices"] = cpu_only()
    report(figures)


if __name__ == "__main__":
    main()
