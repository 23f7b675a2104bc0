"""Whole steps whose code has more in common with other micro-batches than a `self`: they run one after the other.

Layers and steps take naps of random lengths, so that what depends on timing is seen.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric, SumMetric

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.lightning_module import data, difference
from lightning_hetero.testing.naps import RunningMean, late, nap

STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}}
DEVICES = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
FOR_ALL: dict[str, Any] = {"condition": None}
OF_THREAD = threading.local()


class Late(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return late(super().forward(x))


class Base(pl.LightningModule):
    """Three layers, and a step for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.build()
        self.double()

    def build(self) -> None:
        self.net = nn.Sequential(Late(8, 8), nn.Tanh(), Late(8, 8), nn.Tanh(), Late(8, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        nap()
        x, y = batch
        return self.loss(x.double(), y)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class OtherWeights(Base):
    """The target is of the same network with other weights."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        slow = {name: value.detach() * 0.9 for name, value in self.net.named_parameters()}
        with torch.no_grad():
            target = torch.func.functional_call(self.net, slow, (x,))
        z = self.net(x)
        return F.cross_entropy(z, y) + (z - target).pow(2).mean()


class OtherData(Base):
    """The same by `parameter.data`, put back afterwards."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        kept = [parameter.data for parameter in self.net.parameters()]
        for parameter in self.net.parameters():
            parameter.data = parameter.data * 0.9
        with torch.no_grad():
            target = self.net(x)
        for parameter, value in zip(self.net.parameters(), kept, strict=True):
            parameter.data = value
        z = self.net(x)
        return F.cross_entropy(z, y) + (z - target).pow(2).mean()


class HookForAWhile(Base):
    """A hook that is there for one call."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.net(x)
        handle = self.net[2].register_forward_hook(lambda module, args, output: output * 0.5)
        other = self.net(x)
        handle.remove()
        return F.cross_entropy(z, y) + (z - other).pow(2).mean()


class HeadExchanged(Base):
    """Features are what comes without the head."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.net(x)
        head, self.net[4] = self.net[4], nn.Identity()
        features = self.net(x)
        self.net[4] = head
        return F.cross_entropy(z, y) + features.pow(2).mean()


class Block(nn.Module):
    """Multiplied by what `get` says."""

    half = False

    def __init__(self, get: Any = None) -> None:
        super().__init__()
        self.linear, self.get = nn.Linear(8, 8), get
        self.settings = {"inner": {"half": False}}

    def forward(self, x: Tensor) -> Tensor:
        x = late(self.linear(x))
        condition = None if self.get is None else self.get()
        x = x if condition is None else x * condition
        return x * 0.5 if self.half or self.settings["inner"]["half"] else x


class Conditioned(Base):
    """The step puts a condition into an object that blocks share, and takes it away again."""

    def build(self) -> None:
        self.context = SimpleNamespace(condition=None)
        context = self.context
        self.net = nn.Sequential(*(Block(lambda: context.condition) for _ in range(3)), nn.Linear(8, 4))

    def put(self, condition: Tensor | None) -> None:
        self.context.condition = condition

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.put(1 + x.mean(0).abs())
        z = self.net(x)
        self.put(None)
        return F.cross_entropy(z, y)


class ConditionedByGlobal(Conditioned):
    """The same in a dict that is a global."""

    def build(self) -> None:
        self.net = nn.Sequential(*(Block(lambda: FOR_ALL["condition"]) for _ in range(3)), nn.Linear(8, 4))

    def put(self, condition: Tensor | None) -> None:
        FOR_ALL["condition"] = condition


class FlagOfClass(Base):
    """An attribute of a class is switched for one call."""

    def build(self) -> None:
        self.net = nn.Sequential(Block(), Block(), nn.Linear(8, 4))

    def switch(self, on: bool) -> None:
        Block.half = on

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.net(x)
        self.switch(True)
        other = self.net(x)
        self.switch(False)
        return F.cross_entropy(z, y) + (z - other).pow(2).mean()


class FlagDeepDown(FlagOfClass):
    """And one in a dict within a dict."""

    def switch(self, on: bool) -> None:
        self.net[0].settings["inner"]["half"] = on  # type: ignore[index]


class OfThread(Base):
    """A value that each thread has for itself."""

    def build(self) -> None:
        self.net = nn.Sequential(*(Block(lambda: getattr(OF_THREAD, "scale", 1.0)) for _ in range(3)), nn.Linear(8, 4))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        OF_THREAD.scale = 0.5
        return F.cross_entropy(self.net(x), y)


class ReadsStatistics(Base):
    """The step reads a buffer that a part changes."""

    def build(self) -> None:
        self.a, self.norm, self.head = Late(8, 8), nn.BatchNorm1d(8), Late(8, 4)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(self.norm(self.a(x)))
        return F.cross_entropy(z, y) + self.norm.running_mean.pow(2).mean() * z.pow(2).mean()  # type: ignore[union-attr, operator]


class Sliced(Base):
    """One normalisation is reached by two ways."""

    def build(self) -> None:
        self.net = nn.Sequential(
            Late(8, 8), nn.BatchNorm1d(8), nn.Tanh(), Late(8, 8), nn.BatchNorm1d(8), nn.Tanh(), Late(8, 4)
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y) + self.net[:2](2 * x).pow(2).mean()


class StateInEvaluation(Base):
    def build(self) -> None:
        self.a, self.norm, self.head = Late(8, 8), RunningMean(), Late(8, 4)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.norm.eval()
        return F.cross_entropy(self.head(self.norm(self.a(x))), y)


class ReadByAHook(Base):
    """A hook of `__init__` reads what the step sets on self."""

    def build(self) -> None:
        super().build()
        self.scale: Any = None
        self.net[0].register_forward_hook(lambda module, args, output: output * self.scale)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.scale = 1 + x.mean()
        return F.cross_entropy(self.net(x), y)


class SetByAHook(Base):
    """A bound method as a hook keeps features on self."""

    def build(self) -> None:
        super().build()
        self.features = torch.zeros(())
        self.net[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features = output.detach()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y) * self.features.pow(2).mean()


class LossesByName(Base):
    """Bound methods in a dict."""

    def build(self) -> None:
        super().build()
        self.weight = 0.0
        self.losses = {"ce": F.cross_entropy, "size": self.size}

    def size(self, z: Tensor, y: Tensor) -> Tensor:
        return self.weight * z.pow(2).mean()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.weight = float(x.abs().mean())
        z = self.net(x)
        return torch.stack([loss(z, y) for loss in self.losses.values()]).sum()


class Masked(nn.Module):
    """Knows the module above."""

    def __init__(self, above: Any) -> None:
        super().__init__()
        self.linear, self.above = nn.Linear(8, 8), [above]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.above[0].mask  # type: ignore[no-any-return]


class ReadByAPart(Base):
    def build(self) -> None:
        self.mask, self.net = torch.ones(()), nn.Sequential(Masked(self), Late(8, 4))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.mask = (x > 0).double()
        return F.cross_entropy(self.net(x), y)


class FixedNoise(Base):
    """Random numbers that are set and put back."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            nap()
            noise = torch.stack([torch.randn_like(x) for _ in range(4)])
        return F.cross_entropy(self.net(x + 0.1 * noise.mean(0)), y)


class NoiseInBackward(Base):
    """Random numbers in a backward."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.net(x)
        z.register_hook(lambda gradient: gradient + 1e-2 * torch.randn_like(gradient))
        return F.cross_entropy(z, y)


class DefaultDtype(Base):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        nap()
        third = torch.ones(8) / 3
        torch.set_default_dtype(torch.float32)
        return F.cross_entropy(self.net(x * third), y)


class MetricInAPart(Base):
    """A hook on a part calls a metric."""

    def build(self) -> None:
        super().build()
        self.all = CatMetric()
        for layer in self.net:
            layer.register_forward_hook(lambda module, args, output: self.all.update(output.abs().mean().detach()))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


class MetricOfEachEpoch(Base):
    """A new metric instead of a reset."""

    values: ClassVar[list[Tensor]] = []

    def build(self) -> None:
        super().build()
        self.all, self.kept = CatMetric(), SumMetric()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.net(x)
        self.all.update(z.mean().detach())
        return F.cross_entropy(z, y)

    def on_train_epoch_end(self) -> None:
        self.kept(self.all.compute() @ torch.arange(1.0, 17.0))
        self.all = CatMetric()


def state(module: Base) -> list[Any]:
    values = [metric.metric_state for metric in module.modules() if isinstance(metric, (CatMetric, SumMetric))]
    return [torch.as_tensor(each).flatten().tolist() for value in values for each in value.values()]


@pytest.mark.parametrize(
    "kind", sorted({*Base.__subclasses__()} - {NoiseInBackward}, key=str), ids=lambda kind: kind.__name__
)
def test_the_numbers_are_those_of_accumulation(kind: type[Base], plain: Any, hetero: Any) -> None:
    check(kind, plain, hetero)


@pytest.mark.parametrize("kind", [ConditionedByGlobal, FlagDeepDown], ids=lambda kind: kind.__name__)
def test_and_so_they_are_with(kind: type[Base], plain: Any, hetero: Any) -> None:
    check(kind, plain, hetero)


def check(kind: type[Base], plain: Any, hetero: Any) -> None:
    def fit(trainer: Any, batch_size: int) -> Base:
        torch.manual_seed(7)
        OF_THREAD.__dict__.clear()
        module = kind()
        trainer.fit(module, data(rows=64, batch_size=batch_size))
        return module

    alone = fit(plain(accumulate_grad_batches=4), 4)
    for _ in range(2):
        spread = fit(hetero(devices=DEVICES, placement="round_robin", **STEPS), 16)
        assert difference(alone, spread) <= 1e-15
        assert state(spread) == state(alone)


def test_random_numbers_of_a_backward_are_the_same_in_every_run(hetero: Any) -> None:
    def fit() -> NoiseInBackward:
        torch.manual_seed(7)
        module = NoiseInBackward()
        hetero(devices=DEVICES, placement="round_robin", **STEPS).fit(module, data(rows=64, batch_size=16))
        return module

    first = fit()
    assert difference(first, fit()) == difference(first, fit()) == 0.0


def test_what_comes_later_by_another_way_than_self_is_refused(hetero: Any) -> None:
    class Later(ReadByAHook):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            self.scale = 1 + x.mean() if self.current_epoch else torch.ones(())
            return F.cross_entropy(self.net(x), y)

        def build(self) -> None:
            Base.build(self)
            self.net[0].register_forward_hook(lambda module, args, output: self.scaled(output))

        def scaled(self, output: Tensor) -> Tensor:
            return output * self.scale if self.current_epoch else output

    with pytest.raises(UnsupportedError, match=r"self\.scale is set in training_step, or read after it was set, by"):
        hetero(devices=DEVICES, placement="round_robin", **STEPS).fit(Later(), data(rows=32, batch_size=16))
