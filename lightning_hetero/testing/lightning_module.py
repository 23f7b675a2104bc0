"""A LightningModule around any of the small models, and what it takes to compare two runs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.testing.models import MODELS

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer that most runs use."""
    return torch.optim.Adam(parameters, lr=1e-2)


class Classifier(pl.LightningModule):
    """Trains a model of `MODELS` to sort its inputs into four classes; float64, so that differences mean something.

    Args:
        name: Which model.
        make_optimizer: From parameters to optimizer.
    """

    def __init__(self, name: str = "mlp", make_optimizer: OptimizerFactory = adam) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: nn.Module = MODELS[name][0]().double()
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        """Scores of four classes, whatever the shape of the model's output."""
        output: Tensor = self.net(x)
        return output.flatten(1)[:, :4]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss."""
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The scores."""
        return self(batch[0])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """One optimizer over everything."""
        return self.make_optimizer(self.parameters())


def data(name: str = "mlp", rows: int = 40, batch_size: int = 8) -> DataLoader[Any]:
    """Inputs for a model of `MODELS` and random classes, always the same."""
    generator = torch.Generator().manual_seed(1)
    x = MODELS[name][1](rows, generator)
    y = torch.randint(4, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between the states of two modules, buffers included."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.cpu().double() - b.cpu().double()).abs().max()) for a, b in pairs)
