"""What micro-batches of whole steps log, and what they set where their own `self` is not."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision
from torchmetrics.regression import SpearmanCorrCoef

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.lightning_module import Classifier, data

STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}}
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Steps(Classifier):
    """Logs what is asked for."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.write(x, loss)
        return loss

    def write(self, x: Tensor, loss: Tensor) -> None:
        raise NotImplementedError


class Watch(pl.Callback):
    """Keeps what has been logged by the end of each batch, and what progress bars show."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.shown: set[str] = set()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.steps.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.shown |= trainer.progress_bar_metrics.keys()


def logged(
    kind: type[Steps], plain: Any, hetero: Any, rows: int = 26, batch_size: int = 10, **options: Any
) -> tuple[Watch, Watch]:
    """What plain Lightning logs, and what micro-batches log; by default for 26 rows, in batches of 10, 10 and 6."""
    watches = Watch(), Watch()
    plain(callbacks=[watches[0]], max_epochs=2, **options).fit(kind(), data(rows=rows, batch_size=batch_size))
    hetero(devices=EMULATED, callbacks=[watches[1]], max_epochs=2, **options, **STEPS).fit(
        kind(), data(rows=rows, batch_size=batch_size)
    )
    return watches


def assert_equal(watches: tuple[Watch, Watch], bound: float = 1e-6) -> None:
    theirs, ours = watches
    assert len(ours.steps) == len(theirs.steps)
    for step, other in zip(ours.steps, theirs.steps, strict=True):
        assert step.keys() == other.keys()
        assert step == pytest.approx(other, abs=bound)
    assert ours.shown == theirs.shown


def test_what_is_logged_is_what_it_was_at_that_moment(plain: Any, hetero: Any) -> None:
    class Goes(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            value = loss.detach().clone()
            self.log("before", value, on_step=True, on_epoch=True)
            value += 7  # in place
            self.log("after", value, on_step=True, on_epoch=True)

    assert_equal(logged(Goes, plain, hetero))


def test_options_by_position(plain: Any, hetero: Any) -> None:
    class Positions(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("value", loss, True, False, True, True)  # prog_bar, logger, on_step, on_epoch

    watches = logged(Positions, plain, hetero, enable_progress_bar=False)
    assert_equal(watches)
    assert "value_step" in watches[1].shown
    assert "value_epoch" in watches[1].steps[-1]


@pytest.mark.parametrize("size", [1, 10, 64])
def test_a_constant_batch_size_leaves_the_weights_to_rows(plain: Any, hetero: Any, size: int) -> None:
    class Constant(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("value", loss, batch_size=size, on_step=True, on_epoch=True)

    assert_equal(logged(Constant, plain, hetero))


@pytest.mark.parametrize(("rows", "batch_size"), [(26, 10), (30, 8), (28, 8)])  # parts that are alike, and are not
def test_numbers_of_tokens_are_added_up(plain: Any, hetero: Any, rows: int, batch_size: int) -> None:
    class Tokens(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("value", loss, batch_size=x.numel(), on_step=True, on_epoch=True)

    assert_equal(logged(Tokens, plain, hetero, rows, batch_size))


def test_rows_that_do_not_count_in_one_part(plain: Any, hetero: Any) -> None:
    class Some(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            valid = x[:, 0] > 0.4
            mean = x[valid].mean() if bool(valid.any()) else x.sum() * 0
            self.log("value", mean, batch_size=int(valid.sum()), on_step=True, on_epoch=True)

    assert_equal(logged(Some, plain, hetero))


def test_constants_and_numbers_of_python_stay_what_they_are(plain: Any, hetero: Any) -> None:
    class Constants(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("one", torch.ones((), dtype=torch.float64), on_step=True, on_epoch=True)
            self.log("step", float(self.global_step), on_step=True, on_epoch=False)
            self.log("tenth", 0.1, on_step=True, on_epoch=False)

    theirs, ours = logged(Constants, plain, hetero, precision="64-true")
    assert ours.steps == theirs.steps
    assert ours.steps[-1]["tenth"] == 0.1


class Spread(Metric):
    """Needs its whole state for each update: the largest value minus the first one."""

    full_state_update = True
    largest: Tensor
    first: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("largest", torch.tensor(-torch.inf), dist_reduce_fx="max")
        self.add_state("first", torch.tensor(torch.inf), dist_reduce_fx=None)

    def update(self, values: Tensor) -> None:
        if not torch.isfinite(self.first):
            self.first = values.detach()[0]
        self.largest = torch.maximum(self.largest, values.detach().max())

    def compute(self) -> Tensor:
        return self.largest - self.first


class Metrics(Steps):
    """Logs metrics themselves, for the step and for the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.f1 = MulticlassF1Score(4, average="macro")  # not the mean of those of parts
        self.ranks = SpearmanCorrCoef()  # keeps all that it was given
        self.sum, self.max, self.mean = SumMetric(), MaxMetric(), MeanMetric()
        self.spread = Spread()
        self.pair = MetricCollection([MulticlassAccuracy(4, average="micro"), MulticlassPrecision(4)])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        for name, given in {
            "f1": (logits, y),
            "ranks": (x[:, 0], x[:, 1]),
            "sum": (x.sum(),),
            "max": (x.max(),),
            "mean": (loss,),
            "spread": (x[:, 0],),
        }.items():
            metric = getattr(self, name)
            metric(*given)
            self.log(name, metric, on_step=True, on_epoch=True)
        self.pair(logits, y)
        self.log_dict(self.pair, on_step=True, on_epoch=True)
        return loss


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all targets")
def test_metrics_have_the_value_of_the_whole_batch_on_the_step(plain: Any, hetero: Any) -> None:
    assert_equal(logged(Metrics, plain, hetero))


def test_metrics_whose_values_are_logged_get_no_second_update(hetero: Any) -> None:
    updates = []

    class Counts(SumMetric):
        def update(self, value: Tensor) -> None:
            updates.append(float(value))
            super().update(value)

    class Values(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.sum = Counts()

        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("sum", self.sum(x.sum()), reduce_fx="sum")

    hetero(devices=EMULATED, max_epochs=1, **STEPS).fit(Values(), data(rows=30, batch_size=10))
    assert len(updates) == 2 * 4 + 4 + 4  # the first step has not seen yet how they are logged


def test_metrics_that_are_logged_later_on(plain: Any, hetero: Any) -> None:
    """The first time, scalars are averaged by rows."""

    class Later(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.f1 = MulticlassF1Score(4, average="macro")
            self.accuracy = MulticlassAccuracy(4, average="micro")

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            self.f1(logits, y)
            self.accuracy(logits, y)
            if self.global_step:
                self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            if self.global_step > 1:
                self.log("f1", self.f1, on_step=True, on_epoch=True)
            return F.cross_entropy(logits, y)

    theirs, ours = logged(Later, plain, hetero, rows=50)
    for watch in (theirs, ours):
        for name in ("f1", "f1_step"):
            watch.steps[2].pop(name)
    assert_equal((theirs, ours))


def test_metrics_that_are_called_twice_in_a_step_keep_their_last_value(hetero: Any) -> None:
    class Twice(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.sum = SumMetric()

        def write(self, x: Tensor, loss: Tensor) -> None:
            self.sum(1.0)
            self.sum(2.0)
            self.log("sum", self.sum, on_step=True, on_epoch=True)

    watch = Watch()
    trainer = hetero(devices=EMULATED, callbacks=[watch], max_epochs=1, **STEPS)
    trainer.fit(Twice(), data(rows=20, batch_size=10))
    assert [step["sum_step"] for step in watch.steps] == [2.0, 2.0]
    assert trainer.callback_metrics["sum_epoch"] == 2 * 4 * 3.0


def test_what_is_set_on_the_class_is_refused(hetero: Any) -> None:
    class Classy(Steps):
        count = 0

        def write(self, x: Tensor, loss: Tensor) -> None:
            type(self).count += 1

    with pytest.raises(UnsupportedError, match=r"type\(self\)\.count is set in training_step"):
        hetero(devices=EMULATED, **STEPS).fit(Classy(), data(rows=16, batch_size=8))


def test_what_is_set_past_setattr_is_there_afterwards(plain: Any, hetero: Any) -> None:
    class Past(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["count"] = 0

        def write(self, x: Tensor, loss: Tensor) -> None:
            self.__dict__["count"] += len(x)

    module = Past()
    hetero(devices=EMULATED, **STEPS, max_epochs=2).fit(module, data(rows=16, batch_size=8))
    assert module.__dict__["count"] == 32
