"""Runs of a user's LightningModule: on one device with plain Lightning, and over several with `HeteroStrategy`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero import HeteroStrategy
from lightning_hetero.runtime.engine.record import Recording
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import difference

UNEQUAL = "cpu@speed=2,cpu@speed=1,cpu@speed=1"


@dataclass
class Batch:
    """What ran in micro-batches during one batch.

    Attributes:
        micro_batches: Their indices.
        devices: Which devices were at work.
        calls: How many tasks of each kind, by (unit, "F" or "B").
    """

    micro_batches: set[int]
    devices: set[str]
    calls: Counter[tuple[str, str]]


class Watch(pl.Callback):
    """Records every batch of a run.

    Attributes:
        train: The training batches, in order.
        others: The batches of validation, test and prediction.
    """

    def __init__(self) -> None:
        self.train: list[Batch] = []
        self.others: list[Batch] = []
        self._stack = ExitStack()
        self._recording: Recording | None = None

    def _begin(self, trainer: pl.Trainer, *_: Any) -> None:
        self._recording = self._stack.enter_context(trainer.strategy.recording())  # type: ignore[attr-defined]

    def _end(self) -> Batch:
        self._stack.close()
        assert self._recording is not None
        records = self._recording.records
        return Batch(
            {record.micro_batch for record in records},
            {record.device for record in records},
            Counter((record.unit, record.op) for record in records),
        )

    def on_train_batch_end(self, *_: Any) -> None:
        self.train.append(self._end())

    def on_validation_batch_end(self, *_: Any) -> None:
        self.others.append(self._end())

    def on_exception(self, *_: Any) -> None:
        self._stack.close()

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


@dataclass
class Runs:
    """The same training twice.

    Attributes:
        alone: The model that plain Lightning trained on one device.
        spread: The model that was trained over several.
        plain: Lightning's Trainer.
        trainer: The other one.
        watch: What ran in micro-batches.
    """

    alone: Any
    spread: Any
    plain: pl.Trainer
    trainer: pl.Trainer
    watch: Watch

    @property
    def difference(self) -> float:
        """The largest difference of two parameters or buffers."""
        return difference(self.alone, self.spread)

    @property
    def metrics_differ_by(self) -> float:
        """The largest difference of two logged values."""
        theirs, ours = self.plain.callback_metrics, self.trainer.callback_metrics
        assert ours.keys() == theirs.keys()
        return max(abs(float(ours[key]) - float(theirs[key])) for key in theirs)

    def check_every_batch_was_cut(self, parts: int = 4) -> None:
        """Every device of the plan worked on every micro-batch of every batch, forward and (in training) backward.

        Whole steps in micro-batches are rehearsed, one after the other, in the first batch of each kind.
        """
        plan: Any = self.trainer.strategy.plan  # type: ignore[attr-defined]
        names = {device.name for device in plan.used}
        assert len(names) > 1
        rehearsed = plan.execution.schedule not in ("whole", "forward")
        train = self.watch.train[len(self.watch.train) // 2 if rehearsed else 0 :]
        assert train
        for batch in (*train, *self.watch.others):
            assert batch.micro_batches == set(range(parts))
            assert batch.devices == names
        for batch in train:
            assert {op for _, op in batch.calls} == {"F", "B"}


MakeTrainer = Callable[..., pl.Trainer]
FitBoth = Callable[..., Runs]


@pytest.fixture(autouse=True)
def _no_limits(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "accelerator" in request.fixturenames:
        request.getfixturevalue("accelerator").reset()


@pytest.fixture
def quiet(quiet: dict[str, Any]) -> dict[str, Any]:
    """Trainer options for a short run that writes nothing but what the test asks for."""
    return {**quiet, "max_epochs": 2}


@pytest.fixture
def hetero(quiet: dict[str, Any]) -> MakeTrainer:
    """A Trainer with this package's strategy on three devices of unequal speed that the CPU plays, four micro-batches.

    What is no option of the Trainer goes to the strategy.
    """

    def make(
        devices: Any = UNEQUAL, placement: Any = "even", strategy: dict[str, Any] | None = None, **options: Any
    ) -> pl.Trainer:
        given = {"micro_batches": 4, "hang_timeout_s": 60.0, "verbose": False, **(strategy or {})}
        chosen = HeteroStrategy(devices=devices, placement=placement, **given)
        return pl.Trainer(**{**quiet, "strategy": chosen, **options})

    return make


@pytest.fixture(params=["emulated", "accelerator"])
def devices(request: pytest.FixtureRequest) -> str:
    """Three devices: the CPU as all of them, or the CPU and the two of the emulated accelerator."""
    if request.param == "emulated":
        return UNEQUAL
    accelerator: EmulatedAccelerator = request.getfixturevalue("accelerator")
    return ",".join(["cpu", *accelerator.devices[:2]])


@pytest.fixture
def fit_both(plain: MakeTrainer, hetero: MakeTrainer) -> FitBoth:
    """`fit_both(make, train)` trains two models that `make` gives, one with plain Lightning, one over devices.

    `theirs` are options of the plain Trainer alone, and `their_train` its data, where they have to differ. A run that
    cannot be cut at all is not `watched`.
    """

    def fit(
        make: Callable[[], Any],
        train: Any,
        val: Any = None,
        *,
        theirs: dict[str, Any] | None = None,
        their_train: Any = None,
        devices: Any = UNEQUAL,
        placement: Any = "even",
        strategy: dict[str, Any] | None = None,
        watched: bool = True,
        **options: Any,
    ) -> Runs:
        watch = Watch()
        models = []
        one = plain(**{**options, **(theirs or {})})
        several = hetero(
            **{**options, "callbacks": [*([watch] if watched else ()), *options.get("callbacks", ())]},
            devices=devices,
            placement=placement,
            strategy=strategy,
        )
        for trainer, data in ((one, train if their_train is None else their_train), (several, train)):
            torch.manual_seed(0)
            models.append(make())
            trainer.fit(models[-1], data, val)
        return Runs(*models, one, several, watch)

    return fit
