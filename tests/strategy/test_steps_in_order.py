"""Training steps in micro-batches that have to run one after the other: what lanes would do to each other."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.lightning_module import difference
from lightning_hetero.testing.own_backwards import Integrates, Reverses

pl = pytest.importorskip("lightning.pytorch")
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}, "devices": EMULATED, "max_epochs": 1}


class Scaled(nn.Module):
    """Knows its mode without random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1.0 if self.training else 0.5)  # type: ignore[no-any-return]


class Base(pl.LightningModule):  # type: ignore[misc,name-defined]
    """A network, a second one and a metric; the step is `code`."""

    code = "loss = self.net(x).pow(2).mean()"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), Scaled(), nn.Tanh(), nn.Linear(8, 8))
        self.net = self.net.double()
        self.other = copy.deepcopy(self.net)
        self.metric = MeanSquaredError()
        self.register_buffer("centre", torch.zeros(8, dtype=torch.float64))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.net.parameters(), *self.other.parameters()], 0.1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        names = {"self": self, "x": batch[0], "torch": torch, "batch_idx": batch_idx}
        exec(self.code, names)
        return names["loss"]  # type: ignore[return-value]


class OwnBackward(Base):
    """Has a part whose backward calls modules."""

    kind: type[nn.Module] = Integrates

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), self.kind(), nn.Linear(8, 8)).double()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("kind", [Integrates, Reverses])
@pytest.mark.parametrize("no_split", [(), ("1",)])
def test_a_backward_that_calls_parts_of_the_model(
    kind: type[nn.Module], schedule: str, no_split: tuple[str, ...], plain: Any, hetero: Any, caplog: Any
) -> None:
    class Own(OwnBackward):
        pass

    Own.kind = kind
    alone, spread = Own(), Own()
    initial = copy.deepcopy(alone.net[1])
    plain(accumulate_grad_batches=4, max_epochs=2).fit(alone, data(4))
    options = {**STEPS, "max_epochs": 2}
    options["strategy"] = {**STEPS["strategy"], "schedule": schedule, "no_split": [f"net.{n}" for n in no_split]}
    hetero(placement="round_robin", **options).fit(spread, data(16))
    assert difference(alone, spread) < 1e-15
    assert difference(initial, spread.net[1]) > 1e-3
    assert "one after the other, because" in caplog.text


class Given(nn.Module):
    """Hands its weight to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, function: Any) -> Tensor:
        return function(torch.tanh(self.weight) * 1.5)  # type: ignore[no-any-return]


class PartCallsPart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Given(), "c": nn.Linear(8, 8)}).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h = torch.tanh(self.net["a"](batch[0]))
        return self.net["b"](lambda weight: self.net["c"](h @ weight)).pow(2).mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("again", [False, True])
def test_a_part_that_calls_another_part(again: bool, plain: Any, hetero: Any, caplog: Any) -> None:
    alone, spread = PartCallsPart(), PartCallsPart()
    plain(accumulate_grad_batches=4, max_epochs=2).fit(alone, data(4))
    options = {**STEPS, "max_epochs": 2}
    options["strategy"] = {**STEPS["strategy"], "activation_checkpointing": again, "hang_timeout_s": 20.0}
    hetero(placement="round_robin", **options).fit(spread, data(16))
    assert difference(alone, spread) < 1e-15
    reason = "net.b calls another part, and its forward runs again under activation checkpointing"
    assert (f"one after the other, because {reason}" in caplog.text) == again


def data(batch_size: int) -> Any:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return DataLoader(TensorDataset(x), batch_size=batch_size)


TEACHER = """
self.net.eval()
with torch.no_grad(): target = self.net(x)
self.net.train()
loss = (self.net(x + 0.1) - target).pow(2).mean()
"""
ADVERSARY = """
fake = self.net(x)
self.other.requires_grad_(False)
loss = -self.other(fake).mean()
self.other.requires_grad_(True)
loss = loss + self.other(fake.detach()).pow(2).mean()
"""
AVERAGE = """
with torch.no_grad():
    for slow, fast in zip(self.other.parameters(), self.net.parameters()): {}
    target = self.other(x)
loss = (self.net(x + 0.1) - target).pow(2).mean()
"""
METRIC = """
y = self.net(x)
self.metric.update(y, x)
value = self.metric.compute()
self.metric.reset()
loss = y.pow(2).mean() * (1 + value.detach()) + self.other(y).pow(2).mean()
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (TEACHER, "the mode (training or not) of net is switched within it"),
        (ADVERSARY, "requires_grad of other.0.weight is switched within it"),
        (AVERAGE.format("slow.lerp_(fast, 0.05)"), "the parameter other.0.weight is changed"),
        (AVERAGE.format("slow.data = slow.data * 0.9 + fast.data * 0.1"), "the parameter other.0.weight is changed"),
        (AVERAGE.format("slow.data.lerp_(fast.data, 0.05)"), "the data of a parameter are changed"),
        (METRIC, "it calls compute of MeanSquaredError"),
        (METRIC.replace("value = self.metric.compute()", "value = self.metric(y, x)"), "it calls reset of"),
        ("loss = self.net(x).mean(); self.metric(x, x); self.metric.update(x, x)", "it calls MeanSquaredError and its"),
    ],
)  # fmt: skip
def test_what_would_reach_other_micro_batches_runs_in_order(
    code: str, reason: str, plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("Kind", (Base,), {"code": code})
    alone, spread = kind(), kind()
    plain(accumulate_grad_batches=4, max_epochs=1).fit(alone, data(2))
    hetero(**STEPS).fit(spread, data(8))
    assert f"run one after the other, because {reason}" in caplog.text
    assert difference(alone, spread) <= 1e-12


@pytest.mark.parametrize(
    "code",
    [
        "self.other.eval(); loss = (self.net(x) - self.other(x)).pow(2).mean()",
        "self.other.requires_grad_(False); loss = (self.net(x) - self.other(x)).pow(2).mean()",
        "loss = self.net(x).pow(2).mean(); self.metric.update(x, x); self.log('metric', self.metric)",
        "y = self.net(x); self.centre = y.detach().mean(0); loss = (self.net(y) - self.centre).pow(2).mean()",
    ],
)
def test_what_every_micro_batch_sets_for_itself_needs_no_order(
    code: str, plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kind = type("Kind", (Base,), {"code": code})
    alone, spread = kind(), kind()
    plain(accumulate_grad_batches=4, max_epochs=1).fit(alone, data(2))
    hetero(**STEPS).fit(spread, data(8))
    assert "one after the other" not in caplog.text
    assert difference(alone, spread) <= 1e-12
    assert torch.equal(alone.centre, spread.centre)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("self.metric.compute()", "it calls compute of MeanSquaredError, which it did not do in the first step"),
        ("self.metric.reset()", "it calls reset of MeanSquaredError"),
        ("self.other[0].weight.data = self.other[0].weight + 1", "self.other.0.weight goes from one micro-batch"),
    ],
)
def test_what_begins_later_is_an_error(code: str, words: str, hetero: Any) -> None:
    kind = type("Kind", (Base,), {"code": f"loss = self.net(x).pow(2).mean()\nif batch_idx: {code}"})
    with pytest.raises(UnsupportedError, match=words.replace(".", r"\.")):
        hetero(**STEPS).fit(kind(), data(8))


class Beside(Base):
    """Logs numbers of NumPy and returns this and that beside its loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        (x,) = batch
        y = self.net(x)
        a = y.detach().float().numpy()
        self.log("mean", (a**2).mean())
        self.log("count", (a > 0).sum(), reduce_fx="sum")
        names = [str(float(row[0])) for row in x]
        self.outputs = {
            "loss": y.pow(2).mean(), "parts": {"mean": y.detach().mean(), "scores": y.detach()}, "names": names,
            "pair": (y.detach(), x), "array": a, "number": float(a.mean()), "rate": 0.1,
        }  # fmt: skip
        return self.outputs

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen = {key: float(self.trainer.callback_metrics[key]) for key in ("mean", "count")}, outputs


def test_numbers_of_numpy_and_outputs_of_many_kinds_are_those_of_the_batch(plain: Any, hetero: Any) -> None:
    alone, spread = Beside(), Beside()
    plain(max_epochs=1, limit_train_batches=1).fit(alone, data(12))
    hetero(**STEPS, limit_train_batches=1).fit(spread, data(12))
    (logged, mine), (expected, theirs) = spread.seen, alone.seen
    assert logged == pytest.approx(expected, abs=1e-6)
    assert mine["names"] == theirs["names"]
    assert mine["rate"] == 0.1
    for path in ("parts.mean", "parts.scores", "pair.0", "pair.1", "array", "number"):
        pairs = []
        for each in (mine, theirs):
            value: Any = each
            for key in path.split("."):
                value = value[int(key) if key.isdigit() else key]
            pairs.append(np.asarray(value))
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-6), path


class Logs(nn.Module):
    """Has a way to log of its own."""

    def __init__(self, log: Any, as_unit: bool) -> None:
        super().__init__()
        layers = (nn.Linear(8, 8), nn.Linear(8, 4))
        self.a, self.b = (None, None) if as_unit else layers
        self.weight = nn.Parameter(torch.ones(8)) if as_unit else None
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x * self.weight if self.weight is not None else self.a(x))
        self.log("activity", h.detach().pow(2).mean(), on_step=True, on_epoch=True)
        return h if self.b is None else self.b(h)


class HandsOn(Base):
    """Its parts log."""

    def __init__(self, as_unit: bool) -> None:
        super().__init__()
        self.part = Logs(self.log, as_unit).double()
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.part(self.net(batch[0])).pow(2).mean()  # type: ignore[no-any-return]

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(float(self.trainer.callback_metrics["activity_step"]))


@pytest.mark.parametrize("as_unit", [False, True])
@pytest.mark.parametrize("how", ["forward", "step"])
def test_what_parts_log_is_that_of_the_whole_batch(how: str, as_unit: bool, plain: Any, hetero: Any) -> None:
    alone, spread = HandsOn(as_unit), HandsOn(as_unit)
    trainers = plain(max_epochs=1), hetero(**{**STEPS, "strategy": {"micro_batches": 3, "micro_batching": how}})
    for trainer, model in zip(trainers, (alone, spread), strict=True):
        trainer.fit(model, data(12))
    assert spread.seen == pytest.approx(alone.seen, abs=1e-6)
    epochs = [float(trainer.callback_metrics["activity_epoch"]) for trainer in trainers]
    assert epochs[1] == pytest.approx(epochs[0], abs=1e-6)


@pytest.mark.parametrize("name", ["metric", "norm"])
def test_gpipe_with_something_that_some_micro_batches_leave_out(name: str, hetero: Any) -> None:
    class Rare(Base):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            y, use = self.net(batch[0]), float(batch[0][0, 1]) > 0
            if use and name == "metric":
                self.metric.update(y, batch[0])
            return y.pow(2).mean() + (self.norm(y).pow(2).mean() if use and name == "norm" else 0)

    used = [(batch[0][::2, 1] > 0).tolist() for batch in data(8)][1:]  # the first one is a rehearsal
    assert any(True in parts[parts.index(False) :] for parts in used if False in parts)
    options = {"micro_batches": 4, "micro_batching": "step", "schedule": "gpipe", "hang_timeout_s": 10.0}
    hetero(**{**STEPS, "strategy": options}).fit(Rare(), data(8))
