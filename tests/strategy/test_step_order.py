"""What keeps state has the order of micro-batches that run one after the other, however often it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric, SumMetric

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.lightning_module import Classifier, data, difference

STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}}
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Statistics(Classifier):
    """A network whose layers normalise by the batch, called in whatever way `loss` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
        self.net = nn.Sequential(*layers).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Siamese(Statistics):
    """Two views of each row."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y) + (self.net(2 * x + 1) - self.net(3 * x)).pow(2).mean()


class Unrolled(Statistics):
    """As many passes as the first row says: another number for each micro-batch."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        output = self.net(x)
        for _ in range(int(y[0])):
            output = output + self.net(x * output.detach().mean())
        return F.cross_entropy(output, y)


class Again(Statistics):
    """Layers that run again in the backward."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        again: Any = checkpoint(self.net[:3], x, use_reentrant=False, preserve_rng_state=False)
        return F.cross_entropy(self.net[3:](again), y)


@pytest.mark.parametrize("kind", [Siamese, Unrolled, Again])
def test_running_statistics_are_those_of_accumulation_bit_for_bit(
    kind: Callable[[], Statistics], plain: Any, hetero: Any
) -> None:
    alone = kind()
    plain(accumulate_grad_batches=4).fit(alone, data(rows=64, batch_size=4))
    for _ in range(3):  # an order that depends on timing is another one each time
        spread = kind()
        hetero(devices=EMULATED, placement="round_robin", **STEPS).fit(spread, data(rows=64, batch_size=16))
        assert difference(alone, spread) == 0.0


class Counted(Classifier):
    """Calls its metrics several times for each micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.all = SumMetric(), CatMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        for row in (x.sum(), x[0, 0], x[-1, -1], x.max()):
            self.sum(row)
            self.all.update(row)
        return F.cross_entropy(self(x), y)


def test_metrics_that_are_called_several_times_miss_nothing_and_keep_their_order(plain: Any, hetero: Any) -> None:
    def fit(trainer: Any, batch_size: int) -> Counted:
        module = Counted()
        trainer.fit(module, data(rows=64, batch_size=batch_size))
        return module

    alone = fit(plain(accumulate_grad_batches=4), 4)
    for _ in range(3):
        spread = fit(hetero(devices=EMULATED, **STEPS), 16)
        assert torch.equal(spread.all.compute(), alone.all.compute())
        assert spread.sum.compute() == pytest.approx(float(alone.sum.compute()), abs=1e-4)


def test_what_is_called_more_often_than_in_the_first_step_is_refused(hetero: Any) -> None:
    class Later(Statistics):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            loss = F.cross_entropy(self.net(x), y)
            return loss + self.net(2 * x).pow(2).mean() if self.current_epoch else loss

    with pytest.raises(UnsupportedError) as raised:
        hetero(devices=EMULATED, placement="round_robin", **STEPS).fit(Later(), data(rows=64, batch_size=16))
    assert str(raised.value) == (
        "the training step cannot run in micro-batches, because it calls net.1…net.2 more than once, whose calls have "
        "to keep their order, which it did not do in the first step. Set micro_batching='forward'."
    )
