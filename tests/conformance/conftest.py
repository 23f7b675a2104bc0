"""The conformance harness: what Lightning promises, once by plain Lightning and once over devices that get in the way.

How to write a conformance test:

    @pytest.mark.feature("optimizers: gradient clipping by norm")
    def test_clipping_by_norm(both: Any) -> None:
        both(Classifier, gradient_clip_val=0.1).check_parity()

`both` trains the module twice: by plain Lightning on one CPU device, and by `HeteroStrategy` under the hostile policy
(`round_robin`: the first unit off the root device, every further one on the next device). It runs on two sets of three
devices: `emulated`, where the CPU plays all three and batches are cut into two micro-batches, and `accelerator`, the
CPU and two devices of the C++ PrivateUse1 backend, whole batches. Parity is float64 and at most 1e-12; if that fails,
the feature is broken, not the tolerance.

The marker `feature(name, status="works", note="")` is a row of docs/compatibility.md:

- `name` is "group: feature"; `tests/conformance/table.py` has the groups. Several tests, also outside of this folder,
  may share a name if they have the same status.
- `status` is "works", "refused" (a clear error before training, whose text the test checks), or "not verified" (the
  test needs what is rarely there, a CUDA device, say; `note` says what).
- `note` is one short sentence for the page: a limit, or the way out of a refusal.

Its arguments are literals, since the page is made from the source: `python tests/conformance/table.py` writes it, and a
test compares it with the marks. Parametrized tests may put it on their cases, as
`pytest.param(..., marks=pytest.mark.feature(...))`. Every test of this folder has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero import HeteroStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import data, difference

PARITY = 1e-12  # in float64, of every number on one device and over several
EMULATED = "cpu@speed=2,cpu@speed=1,cpu@speed=1"

Run = Callable[[pl.Trainer, Any], Any]
MakeTrainer = Callable[..., pl.Trainer]


@dataclass(frozen=True)
class Devices:
    """Three devices that a test runs on.

    Attributes:
        names: For `HeteroStrategy(devices=)`; the root is first.
        micro_batches: What `HeteroStrategy(micro_batches=)` gets unless the test says otherwise.
    """

    names: Any
    micro_batches: int | None


@dataclass
class Side:
    """One of the two runs.

    Attributes:
        model: What was trained.
        trainer: By whom.
        result: What the test's `run` returned.
    """

    model: Any
    trainer: Any
    result: Any = None


@dataclass
class Sides:
    """The same run twice.

    Attributes:
        alone: By plain Lightning on one device.
        spread: By `HeteroStrategy` over three.
    """

    alone: Side
    spread: Side

    @property
    def difference(self) -> float:
        """The largest difference of two parameters or buffers."""
        return difference(self.alone.model, self.spread.model)

    @property
    def metrics_differ_by(self) -> float:
        """The largest difference of two logged values; both sides logged the same names."""
        theirs, ours = self.alone.trainer.callback_metrics, self.spread.trainer.callback_metrics
        assert ours.keys() == theirs.keys()
        return max((abs(float(ours[key]) - float(theirs[key])) for key in theirs), default=0.0)

    def check_parity(self) -> None:
        """Both sides have the same parameters, buffers and logged values."""
        assert self.difference <= PARITY
        assert self.metrics_differ_by <= PARITY

    def check_it_was_spread(self) -> None:
        """The plan used several devices, and its first unit was not on the root."""
        plan = self.spread.trainer.strategy.plan
        assert len(plan.used) > 1
        assert next(iter(plan.device_of.values())) != self.spread.trainer.strategy.inventory.root.name


@dataclass(frozen=True)
class Both:
    """What the fixture `both` gives.

    Attributes:
        plain: Makes plain Lightning's Trainer.
        hostile: Makes ours.
    """

    plain: MakeTrainer
    hostile: MakeTrainer

    def __call__(
        self,
        make: Callable[[], Any],
        *,
        run: Run = lambda trainer, model: trainer.fit(model, data()),
        callbacks: Callable[[], Sequence[Any]] = list,
        strategy: dict[str, Any] | None = None,
        spread: bool = True,
        **options: Any,
    ) -> Sides:
        """Run on both sides.

        Args:
            make: Makes the module, once for each side, under the same seed.
            run: From trainer and module to any result; by default `trainer.fit(model, data())`.
            callbacks: Makes the callbacks, once for each side.
            strategy: Options of `HeteroStrategy`.
            spread: Whether to check that several devices were used.
            options: Of both Trainers.
        """

        def side(trainer: pl.Trainer) -> Side:
            torch.manual_seed(0)
            model = make()
            return Side(model, trainer, run(trainer, model))

        sides = Sides(
            side(self.plain(callbacks=list(callbacks()), **options)),
            side(self.hostile(callbacks=list(callbacks()), strategy=strategy, **options)),
        )
        if spread:
            sides.check_it_was_spread()
        return sides


@pytest.fixture(params=["emulated", "accelerator"])
def devices(request: pytest.FixtureRequest) -> Iterator[Devices]:
    """Three devices: the CPU as all of them, in micro-batches, or the CPU and two accelerators on whole batches."""
    if request.param == "emulated":
        yield Devices(EMULATED, micro_batches=2)
        return
    accelerator: EmulatedAccelerator = request.getfixturevalue("accelerator")
    yield Devices(["cpu", *accelerator.devices[:2]], micro_batches=None)
    accelerator.reset()


@pytest.fixture
def hostile(quiet: dict[str, Any], devices: Devices) -> MakeTrainer:
    """`hostile(strategy={...}, **options)`: a Trainer with the hostile policy; `strategy` are options of ours."""

    def make(*, strategy: dict[str, Any] | None = None, **options: Any) -> pl.Trainer:
        chosen = {
            "devices": devices.names,
            "placement": "round_robin",
            "micro_batches": devices.micro_batches,
            "hang_timeout_s": 60.0,
            "verbose": False,
            **(strategy or {}),
        }
        return pl.Trainer(**{**quiet, "max_epochs": 2, "strategy": HeteroStrategy(**chosen), **options})

    return make


@pytest.fixture
def both(plain: MakeTrainer, hostile: MakeTrainer) -> Both:
    """The same run on both sides."""
    return Both(plain, hostile)
