"""Work that takes a GPU some time, so that a copy which does not wait for it, or a buffer reused too early, shows.

Between the layers of the GPU stands one on the CPU that costs next to nothing: tensors of 16 MiB come and go at once,
in one piece or in parts of 8, 4 and 1 MiB.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import difference

BOUND = 1e-11  # in float64: sums have a thousand terms
STEPS = 6
WAYS: dict[str, dict[str, Any]] = {
    "whole": {"micro_batches": 1},
    "halves": {"micro_batches": 2},
    "forward": {"micro_batches": 4},
    "many": {"micro_batches": 16},
    "rematerialize": {"micro_batches": 4, "rematerialize": True},
    "1f1b": {"micro_batches": 4, "micro_batching": "step"},
    "gpipe": {"micro_batches": 8, "micro_batching": "step", "schedule": "gpipe"},
}


class Scale(nn.Module):
    """Multiplies by a weight for each feature. Shape (rows, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Heavy(pl.LightningModule):
    """Layers for the GPU, each with one for the CPU behind it. Input (rows, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = (layer for _ in range(4) for layer in (nn.Linear(width, width), Scale(width)))
        self.net = nn.Sequential(*pairs).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (torch.tanh(self.net(batch[0])) - batch[1]).square().mean() * 10

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_large_tensors_that_come_and_go(way: str, places: list[str], gpu: Any, over: Any, alone: Any) -> None:
    width, rows = (1024, 2048) if gpu.is_real else (64, 64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * rows, width, generator=generator, dtype=torch.float64)
    batches = DataLoader(TensorDataset(x, x.flip(1)), batch_size=rows)
    placement = {f"net.{index}": "cpu" if index % 2 else gpu.name for index in range(8)}
    trained = []
    for _ in range(2):
        trained.append(Heavy(width))
        over(places, strategy={"placement": placement, **WAYS[way]}, max_epochs=1).fit(trained[-1], batches)
    single = Heavy(width)
    alone(gpu, max_epochs=1).fit(single, batches)
    assert difference(*trained) == 0.0
    assert difference(trained[0], single) <= BOUND
    assert difference(single, Heavy(width)) > 1e-4  # it has learnt something
