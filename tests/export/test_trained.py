"""Models trained over three devices, taken away to three different runtimes that run as a chain."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule
from lightning_hetero.demos.stdlib_lm import TinyGPT
from lightning_hetero.errors import UnsupportedError
from lightning_hetero.plan import Plan
from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy

THREE = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
RUNTIMES = {
    "emulated:0": "onnx:CPUExecutionProvider",
    "emulated:1": "openvino:CPU",
    "emulated:2": "torchscript:cpu",
}


def trained(model: pl.LightningModule, data: Any, quiet: dict[str, Any]) -> Plan:
    """Train over three devices; gives the plan."""
    strategy = HeteroStrategy(devices=THREE, placement="even", verbose=False)
    pl.Trainer(**{**quiet, "strategy": strategy, "max_epochs": 1}).fit(model, data)
    assert strategy.plan is not None
    assert [device.name for device in strategy.plan.used] == list(RUNTIMES)
    model.eval()
    return strategy.plan


@pytest.mark.filterwarnings("ignore:target 'torchscript'")
def test_digits_through_three_runtimes(take_away: Any, rng: Any, quiet: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, data = DigitsCNN(width=8, lr=1e-2), DigitsDataModule(seed=1)
    plan = trained(model, data, quiet)
    manifest, runtime = take_away(model, torch.rand(2, 1, 8, 8, generator=rng), placement=plan, targets=RUNTIMES)

    assert {stage.target.partition(":")[0] for stage in manifest.stages} == {"onnx", "openvino", "torchscript"}
    images, labels = next(iter(DataLoader(data.test_dataloader().dataset, batch_size=1000)))
    wanted = model(images).detach()
    for rows in (1, 7, 64):
        assert float((runtime(images[:rows]) - wanted[:rows]).abs().max()) <= 1e-5
    found = runtime(images)
    accuracy = float((found.argmax(1) == labels).float().mean())
    assert accuracy == float((wanted.argmax(1) == labels).float().mean())
    assert accuracy > 0.5  # it has learnt something, of ten classes


@pytest.mark.filterwarnings("ignore:target 'torchscript'")
def test_a_transformer_through_three_runtimes(take_away: Any, rng: Any, quiet: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = TinyGPT(context=8, dim=16, depth=3, heads=2)
    texts = torch.randint(0, 256, (16, 9), generator=rng)
    plan = trained(model, DataLoader(TensorDataset(texts[:, :-1], texts[:, 1:]), batch_size=8), quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        manifest, runtime = take_away(model, texts[:2, :-1], placement=plan, targets=RUNTIMES)

    assert {stage.target.partition(":")[0] for stage in manifest.stages} == {"onnx", "openvino", "torchscript"}
    for rows in (1, 7, 64):
        tokens = torch.randint(0, 256, (rows, 8), generator=rng)
        assert float((runtime(tokens) - model(tokens).detach()).abs().max()) <= 1e-5


def test_a_model_that_a_run_still_holds_is_refused(take_away: Any, quiet: dict[str, Any], accelerator: Any) -> None:
    class TakeAway(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            take_away(module, torch.rand(2, 1, 8, 8))

    strategy = HeteroStrategy(devices=["cpu", *accelerator.devices[:2]], placement="even", verbose=False)
    options = {"strategy": strategy, "max_epochs": 1, "limit_train_batches": 2, "callbacks": [TakeAway()]}
    trainer = pl.Trainer(**{**quiet, **options})
    with pytest.raises(
        UnsupportedError, match=r"^DigitsCNN is spread over devices by a run at the moment.*has returned"
    ):
        trainer.fit(DigitsCNN(width=8), DigitsDataModule())
