"""A training loop with Fabric around any of the small models, and what it takes to compare two runs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hetero.testing.lightning_module import data, difference
from lightning_hetero.testing.models import MODELS

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Unlike Adam, it makes nothing of gradients that are zero but for rounding."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def net(name: str = "mlp") -> nn.Module:
    """A model of `MODELS` in float64, always with the same numbers."""
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Cross-entropy of four classes."""
    return F.cross_entropy(model(batch[0]).flatten(1)[:, :4], batch[1])


@dataclass
class Run:
    """A model that is trained with Fabric.

    Attributes:
        fabric: The Fabric.
        model: As it wrapped it.
        optimizer: The same.
        losses: One for each batch.
    """

    fabric: Any
    model: Any
    optimizer: Any
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, fabric: Any, model: nn.Module, make_optimizer: OptimizerFactory = sgd) -> Run:
        """Set up a model, and an optimizer that was made before."""
        return cls(fabric, *fabric.setup(model, make_optimizer(model.parameters())))

    def go_on(self, batches: DataLoader[Any], after_backward: Callable[[Run], object] = lambda run: None) -> Run:
        """Train on these batches."""
        for batch in self.fabric.setup_dataloaders(batches):
            self.optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            self.fabric.backward(loss)
            after_backward(self)
            self.optimizer.step()
            self.losses.append(loss.item())
        return self

    @property
    def was_spread(self) -> bool:
        """Whether several devices were used, and the first unit was not on the root."""
        strategy = self.fabric.strategy
        plan = strategy.plan_of(self.model)
        return len(plan.used) > 1 and next(iter(plan.device_of.values())) != strategy.inventory.root.name

    def differs_from(self, other: Run) -> float:
        """The largest difference of two losses, parameters or buffers."""
        losses = (abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        return max(difference(self.model, other.model), *losses, 0.0)


def train(
    fabric: Any,
    name: str = "mlp",
    make_optimizer: OptimizerFactory = sgd,
    after_backward: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Five steps of a model of `MODELS`."""
    return Run.of(fabric, net(name), make_optimizer).go_on(data(name), after_backward)
