"""Collections of metrics in whole steps: they hand states from one metric to the next, and micro-batches flow."""

from __future__ import annotations

import copy
import gc
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import MinMaxMetric, MultitaskWrapper

from lightning_hetero.testing.lightning_module import Classifier, data, difference
from lightning_hetero.testing.naps import nap

STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}}
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Trend(Metric):
    """A mean in which what is older counts less, so that it tells orders apart. It takes its time."""

    full_state_update = True
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, x: Tensor) -> None:
        before = self.value
        nap()
        self.value = 0.9 * before + x.double().mean()
        nap()

    def compute(self) -> Tensor:
        nap()
        return self.value


class Square(Trend):
    """Has the same state, and is sometimes late when it is given that of another one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "value" and os.urandom(1)[0] % 3 == 0:
            time.sleep(0.01)  # longer than an update
        super().__setattr__(name, value)

    def compute(self) -> Tensor:
        return self.value**2


class Collects(Classifier):
    """Uses a collection in the way that `use` says."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = MetricCollection({"a_trend": Trend(), "square": Square(), "mean": MeanMetric()})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.use(x)
        return loss

    def use(self, x: Tensor) -> None:
        raise NotImplementedError


class Updates(Collects):
    def use(self, x: Tensor) -> None:
        self.metrics.update(x)


class Calls(Collects):
    def use(self, x: Tensor) -> None:
        self.metrics(x)


class UpdatesAndLogs(Collects):
    def use(self, x: Tensor) -> None:
        self.metrics.update(x)
        self.log_dict(self.metrics, on_step=False, on_epoch=True)


class CallsAndLogs(Collects):
    def use(self, x: Tensor) -> None:
        self.metrics(x)
        self.log_dict(self.metrics, on_step=False, on_epoch=True)


class TakesOut(Collects):
    """Asks for metrics by their names, which gets them copies of the state that they share."""

    def use(self, x: Tensor) -> None:
        self.metrics.update(x)
        nap()
        for name in ("a_trend", "square"):
            self.log(name, self.metrics[name], on_step=False, on_epoch=True)


class OneByOne(Collects):
    """Updates some of them by their names."""

    def use(self, x: Tensor) -> None:
        self.metrics["a_trend"].update(x)
        self.metrics["mean"].update(x.mean(), weight=len(x))
        self.metrics["square"].update(x[:1])


class InALoop(Collects):
    def use(self, x: Tensor) -> None:
        for name, metric in self.metrics.items():
            metric(x)
            self.log(name, metric, on_step=False, on_epoch=True)


class Outside(Collects):
    """Has one of the metrics as an attribute, too."""

    def __init__(self) -> None:
        super().__init__()
        self.trend = self.metrics["a_trend"]

    def use(self, x: Tensor) -> None:
        self.trend.update(x[:2])
        self.metrics.update(x)


class Twice(Collects):
    """A metric in two collections."""

    def __init__(self) -> None:
        super().__init__()
        self.others = MetricCollection({"square": self.metrics["square"], "trend": Trend()}, prefix="other/")

    def use(self, x: Tensor) -> None:
        self.metrics(x)
        self.others.update(x[1:])


def kept(kind: Callable[[], Collects], trainer: Any, batch_size: int) -> dict[str, float]:
    """States, and what is logged, by the end of the last of two epochs."""
    module, found = kind(), {}

    def look() -> None:
        for name, metric in module.metrics.items(keep_base=True, copy_state=False):
            found[f"{name}.state"] = float(next(iter(metric.metric_state.values())))
            found[f"{name}.updates"] = float(metric.update_count)

    module.on_train_epoch_end = look  # type: ignore[method-assign]
    trainer.fit(module, data(rows=48, batch_size=batch_size))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss"}
    return {**found, **{name: value for name, value in logged.items() if name in ("a_trend", "square", "mean")}}


WAYS = [Updates, Calls, UpdatesAndLogs, CallsAndLogs, TakesOut, OneByOne, InALoop, Outside, Twice]


@pytest.mark.parametrize("kind", WAYS)
def test_states_are_those_of_accumulation_and_micro_batches_flow(
    kind: type[Collects], plain: Any, hetero: Any, caplog: Any
) -> None:
    theirs = kept(kind, plain(accumulate_grad_batches=4), 4)
    for _ in range(3):  # an order that depends on timing is another one each time
        ours = kept(kind, hetero(devices=EMULATED, placement="round_robin", **STEPS), 16)
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert "one after the other" not in caplog.text


def test_a_collection_that_is_computed_in_the_step_runs_one_by_one(plain: Any, hetero: Any, caplog: Any) -> None:
    class Computes(Collects):
        def use(self, x: Tensor) -> None:
            self.metrics.update(x)
            self.log("so_far", self.metrics.compute()["a_trend"], on_step=True)

    theirs = kept(Computes, plain(accumulate_grad_batches=4), 4)
    assert kept(Computes, hetero(devices=EMULATED, **STEPS), 16) == pytest.approx(theirs, rel=1e-6)
    assert "it calls compute of MetricCollection" in caplog.text


class Classifies(Classifier):
    """Metrics of classes, three of which share their counts, logged for the step and the epoch."""

    def __init__(self) -> None:
        super().__init__()
        metrics = [MulticlassAccuracy(4), MulticlassPrecision(4), MulticlassRecall(4, average="micro")]
        self.train_metrics = MetricCollection(metrics, prefix="train/")
        self.val_metrics = self.train_metrics.clone(prefix="val/")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.log_dict(self.train_metrics(logits, y), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.val_metrics.update(self(x), y)
        self.log_dict(self.val_metrics)

    def on_validation_end(self) -> None:
        if self.trainer.strategy.strategy_name == "hetero":
            engine = self.trainer.strategy._placed.engine
            self.trials = sum(region.trials for region in engine.interceptions.regions)
            self.calls_cut = engine.cut_calls


class Averages(Collects):
    """Averages of what was computed with states: the next micro-batch sees what this one has done."""

    def use(self, x: Tensor) -> None:
        trend = self.metrics["a_trend"]
        trend.update(x)
        trend.value = trend.value * 0.9


class Scales(Collects):
    def use(self, x: Tensor) -> None:
        self.metrics["a_trend"].update(x)
        self.metrics["square"].update(x * self.metrics["a_trend"].value)


class Counts(Collects):
    def use(self, x: Tensor) -> None:
        nap()
        self.metrics["a_trend"].update(x)
        self.metrics["square"].update(x * self.metrics["a_trend"].update_count)


class Copied(Collects):
    def use(self, x: Tensor) -> None:
        self.metrics["a_trend"].update(x)
        so_far = copy.deepcopy(self.metrics["a_trend"])
        assert type(so_far) is Trend
        self.metrics["square"].update(x * so_far.compute())


GLOBAL = Trend()


class Global(Collects):
    """Has a metric that is no attribute."""

    def __init__(self) -> None:
        super().__init__()
        GLOBAL.reset()

    def use(self, x: Tensor) -> None:
        GLOBAL.update(x)
        self.metrics["square"].update(GLOBAL.value)


class Appends(Collects):
    """Adds to a state itself."""

    def __init__(self) -> None:
        super().__init__()
        self.all = CatMetric()

    def use(self, x: Tensor) -> None:
        nap()
        vars(self.all)["value"].append(x.sum()[None])
        self.metrics.update(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Averages, "it reads the state of MetricCollection, which depends on the micro-batches before"),
        (Scales, "it reads the state of MetricCollection, which depends on the micro-batches before"),
        (Counts, "it reads the state of MetricCollection, which depends on the micro-batches before"),
        (Copied, "it reads the state of MetricCollection, which depends on the micro-batches before"),
        (Appends, "the state of CatMetric is set, and not by its update"),
        (Global, "GLOBAL._update_count is set"),
    ],
)
def test_code_that_has_its_way_with_states_runs_one_by_one(
    kind: type[Collects], reason: str, plain: Any, hetero: Any, caplog: Any
) -> None:
    theirs = kept(kind, plain(accumulate_grad_batches=4), 4)
    assert kept(kind, hetero(devices=EMULATED, placement="round_robin", **STEPS), 16) == pytest.approx(theirs, rel=1e-6)
    assert f"one after the other, because {reason}" in caplog.text


class Wrapped(Collects):
    """Updates what is in wrappers and compositions by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.extremes, self.sum = MinMaxMetric(Trend()), Trend() + Trend()
        self.tasks = MultitaskWrapper({"one": Trend(), "two": MetricCollection({"three": Trend(), "four": Square()})})

    def use(self, x: Tensor) -> None:
        self.extremes._base_metric.update(x)
        self.sum.metric_a.update(x)
        self.sum.metric_b.update(x[:1])
        for metric in self.tasks.task_metrics.values():
            metric.update(x)


def test_metrics_in_others_that_are_used_by_themselves(plain: Any, hetero: Any, caplog: Any) -> None:
    def states(trainer: Any, batch_size: int) -> list[float]:
        module, found = Wrapped(), []
        module.on_train_epoch_end = lambda: found.extend(  # type: ignore[method-assign]
            float(each.value) for each in module.modules() if isinstance(each, Trend)
        )
        trainer.fit(module, data(rows=48, batch_size=batch_size))
        return found

    theirs = states(plain(accumulate_grad_batches=4), 4)
    for _ in range(2):
        assert states(hetero(devices=EMULATED, placement="round_robin", **STEPS), 16) == pytest.approx(theirs)
    assert "one after the other" not in caplog.text


@pytest.mark.parametrize("micro_batching", ["forward", "step"])
def test_shallow_copies_are_things_of_their_own(hetero: Any, micro_batching: str) -> None:
    """Those of metrics, and of modules whose calls are cut."""

    class Copies(Collects):
        seen: list[bool]

        def use(self, x: Tensor) -> None:
            self.metrics["mean"].update(x)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            mean = copy.copy(self.metrics["mean"])
            before = self.metrics["mean"].update_count
            mean.reset()
            mean(torch.ones(3))
            part = copy.copy(self.net)
            part._modules = {**part._modules, "second": torch.nn.Identity()}
            part.act = torch.nn.Identity()
            self.seen.append(self.metrics["mean"].update_count == before and float(mean.compute()) == 1.0)
            self.seen.append(type(part).forward(part, batch[0]).equal(part(batch[0])))
            self.seen.append("__getstate__" not in vars(mean) and "__getstate__" not in vars(part))

    module = Copies()
    module.seen = []
    trainer = hetero(devices=EMULATED, strategy={"micro_batches": 4, "micro_batching": micro_batching})
    trainer.fit(module, data(rows=48, batch_size=16))
    assert module.seen
    assert all(module.seen)
    for each in module.modules():
        assert not {"__getstate__", "forward", "_compiled_call_impl"} & vars(each).keys()


def test_metrics_that_are_replaced_are_let_go(hetero: Any) -> None:
    class Replaces(Collects):
        made: list[weakref.ref[Metric]]

        def on_train_epoch_start(self) -> None:
            self.trend = Trend()
            self.made.append(weakref.ref(self.trend))

        def use(self, x: Tensor) -> None:
            self.trend.update(x)
            gc.collect()
            assert [each() is not None for each in self.made[:-1]] == [False] * (len(self.made) - 1)

    module = Replaces()
    module.made = []
    hetero(devices=EMULATED, max_epochs=4, **STEPS).fit(module, data(rows=32, batch_size=16))
    assert len(module.made) == 4


class Unmeasured(Classifies):
    """Has the metrics, and does not use them."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize("micro_batching", ["forward", "step"])
def test_validation_is_cut_however_often_metrics_have_been_updated(
    plain: Any, hetero: Any, caplog: Any, micro_batching: str
) -> None:
    """Their counters of updates are no settings by which the model decides."""
    batches = data(rows=96, batch_size=4)
    options = {"micro_batches": 2, "micro_batching": micro_batching}

    def fit(module: Classifies) -> Any:
        trainer = hetero(devices=EMULATED, strategy=options, num_sanity_val_steps=0)
        trainer.fit(module, batches, batches)
        return trainer

    module, unmeasured = Classifies(), Unmeasured()
    ours, theirs = fit(module), plain()
    fit(unmeasured)
    theirs.fit(Classifies(), batches, batches)
    for name in ("val/MulticlassAccuracy", "val/MulticlassPrecision", "val/MulticlassRecall"):
        assert float(ours.callback_metrics[name]) == pytest.approx(float(theirs.callback_metrics[name]), abs=1e-6)
    assert "keeps changing" not in caplog.text
    assert "one after the other" not in caplog.text
    assert module.calls_cut == 2 * 2 * 24  # batches of training and of validation in two epochs
    assert module.trials <= unmeasured.trials + 1  # one when Lightning notes that the module has metrics


@pytest.mark.parametrize("by_name", [True, False])
def test_a_forward_that_decides_by_a_metric_is_asked_each_time(plain: Any, hetero: Any, by_name: bool) -> None:
    """It normalises by the batch once a metric has had more than three updates."""

    class Decides(Classifier):
        by_name = True

        def __init__(self) -> None:
            super().__init__()
            self.seen = MetricCollection({"mean": MeanMetric()})

        @property
        def count(self) -> int:
            if self.by_name:
                return self.seen["mean"].update_count
            return max(each.update_count for each in self.modules() if isinstance(each, Metric))

        def forward(self, x: Tensor) -> Tensor:
            if self.count > 3:
                x = x - x.mean(0)
            return super().forward(x)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.seen["mean"].update(loss.detach())
            return loss

    def losses(trainer: Any) -> list[float]:
        module, found = Decides(), []
        module.by_name = by_name
        module.on_train_batch_end = lambda outputs, *_: found.append(float(outputs["loss"]))  # type: ignore
        trainer.fit(module, data(rows=64, batch_size=8))
        return found

    assert losses(hetero(strategy={"micro_batches": 2})) == pytest.approx(losses(plain()), abs=1e-6)


class Measured(torch.nn.Module):
    """Has a parameter of its own, and a metric. Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.ones(8))
        self.norm = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x)) * self.scale
        self.norm.update(x.detach().norm())
        return x


@pytest.mark.parametrize("micro_batching", ["forward", "step"])
def test_parts_that_have_metrics_are_where_the_plan_says(
    plain: Any, hetero: Any, accelerator: Any, micro_batching: str
) -> None:
    class Inside(Classifier):
        places: set[str]

        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(Measured(), torch.nn.Linear(8, 8), Measured()).double()
            self.places = set()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.places |= {str(each.device) for each in (self.net[2].scale, self.net[2].norm.mean_value)}

        def on_train_epoch_end(self) -> None:
            self.log("norm", self.net[2].norm.compute() / 2)

    where = {"net.2": accelerator.devices[0], "": "cpu"}
    options = {"micro_batches": 4, "micro_batching": micro_batching}
    alone, spread = Inside(), Inside()
    theirs = plain(accumulate_grad_batches=4 if micro_batching == "step" else 1)
    theirs.fit(alone, data(rows=48, batch_size=4 if micro_batching == "step" else 16))
    ours = hetero(placement=where, strategy=options)
    ours.fit(spread, data(rows=48, batch_size=16))
    assert spread.places == {accelerator.devices[0]}
    assert difference(alone, spread) < 1e-12
    assert float(ours.callback_metrics["norm"]) == pytest.approx(float(theirs.callback_metrics["norm"]), rel=1e-6)


def test_metrics_may_be_updated_before_a_second_forward(plain: Any, hetero: Any) -> None:
    """The forward does not look at them."""

    class Means(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.metrics = MeanMetric(), MetricCollection([MulticlassAccuracy(4), MulticlassPrecision(4)])

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.mean.update(loss.detach())
            self.metrics.update(logits, batch[1])
            return loss

    alone, spread = Means(), Means()
    plain().fit(alone, data(rows=48, batch_size=16))
    hetero(devices=EMULATED, strategy={"micro_batches": 4, "rematerialize": True}).fit(
        spread, data(rows=48, batch_size=16)
    )
    assert difference(alone, spread) < 1e-12
    assert float(alone.mean.compute()) == pytest.approx(float(spread.mean.compute()))
