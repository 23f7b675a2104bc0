"""A Lightning project that never heard of this package, as a file, once for each of Lightning's namespaces."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
PROJECT = '''
import json

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import NAMESPACE as pl


class Net(pl.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        parts = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 4)
        self.net = nn.Sequential(*parts).double()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
        return DataLoader(TensorDataset(x, torch.randint(4, (40,), generator=generator)), batch_size=8)


def train(max_epochs=2, ckpt_path=None, save_to=None, **options):
    """The losses of a run."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=max_epochs, enable_checkpointing=False, **quiet, **options)
    model = Net()
    trainer.fit(model, ckpt_path=ckpt_path)
    if save_to:
        trainer.save_checkpoint(save_to)
    return model.losses


if __name__ == "__main__":
    print(json.dumps(train()))
'''


@pytest.fixture(params=NAMESPACES)
def namespace(request: pytest.FixtureRequest) -> str:
    """Each of Lightning's namespaces."""
    name: str = request.param
    return name


@pytest.fixture
def project(tmp_path: Path) -> Callable[[str], ModuleType]:
    """Writes the project for one namespace, as `project_lightning_pytorch.py` or so, and imports it here."""

    def load(namespace: str) -> ModuleType:
        name = f"project_{namespace.replace('.', '_')}"
        path = tmp_path / f"{name}.py"
        path.write_text(PROJECT.replace("NAMESPACE", namespace))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
