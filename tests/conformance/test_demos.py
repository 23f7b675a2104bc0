"""Programs from the installed lightning package, unchanged: what spreads them is in the environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, DemoModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)

TEXT = "the quick brown fox jumps over the lazy dog and runs on and on into the dark wood where nobody goes\n"
PROGRAMS = pytest.mark.feature(
    "programs: demos of lightning with PL_TRAINER_STRATEGY=hetero", note="Nothing of their code is changed."
)


class Losses(pl.Callback):
    """Notes the loss of every step, and what became of the weights."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs and outputs.get("loss") is not None:
            self.seen.append(outputs["loss"].item())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen += [p.detach().abs().sum().item() for p in pl_module.parameters()]


def language_model(kind: Any) -> Callable[[pl.Trainer], Any]:
    def run(trainer: pl.Trainer) -> Any:
        model = kind(vocab_size=WikiText2().vocab_size)
        trainer.fit(model)
        return model

    return run


def boring(kind: Any) -> Callable[[pl.Trainer], Any]:
    def run(trainer: pl.Trainer) -> Any:
        model = kind()
        trainer.fit(model, datamodule=BoringDataModule())
        return model

    return run


def demo(trainer: pl.Trainer) -> Any:
    model = DemoModel()
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(16, 32), batch_size=4))
    return model


@PROGRAMS
@pytest.mark.parametrize(
    ("devices", "run", "batches"),
    [
        # An accelerator draws other random numbers for dropout than a CPU, on one device too.
        pytest.param("emulated", language_model(LightningTransformer), 4, id="transformer"),
        # A batch takes seconds. The second one sees what the first has left: hidden state and weights.
        pytest.param("emulated", language_model(LightningLSTM), 2, id="lstm"),
        *(
            pytest.param(devices, run, 4, id=f"{name}-{devices}")
            for devices in ("emulated", "accelerator")
            for name, run in {
                "boring": boring(BoringModel),
                "manual": boring(ManualOptimBoringModel),
                "demo": demo,
            }.items()
        ),
    ],
    indirect=["devices"],
)
def test_the_losses_are_those_of_one_device(
    run: Callable[[pl.Trainer], Any],
    batches: int,
    devices: Any,
    quiet: dict[str, Any],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext-2.txt").write_text(TEXT * 200)  # what the programs would download

    def train() -> tuple[pl.Trainer, Losses, Any]:
        losses = Losses()
        pl.seed_everything(1, verbose=False)
        options = {"max_epochs": 1, "limit_train_batches": batches, "limit_val_batches": 2, "precision": "64-true"}
        trainer = pl.Trainer(**{**quiet, **options, "callbacks": [losses]})
        return trainer, losses, run(trainer)

    _, alone, _ = train()
    names = devices.names if isinstance(devices.names, str) else ",".join(devices.names)
    for variable, value in {
        "PL_TRAINER_STRATEGY": "hetero",
        "HETERO_DEVICES": names,
        "HETERO_PLACEMENT": "round_robin",
        "HETERO_MICRO_BATCHES": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    trainer, spread, _ = train()
    plan = trainer.strategy.plan
    assert next(iter(plan.device_of.values())) != plan.root.name
    assert len(alone.seen) > batches  # weights, too
    assert spread.seen == pytest.approx(alone.seen, rel=1e-12, abs=1e-12)
