"""Callbacks that put other weights into a model, as averages do, leave each parameter where the plan wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_hetero.testing import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference


class Average(pl.Callback):
    """Validates with an average of the weights, all of it kept on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.backup: dict[str, Tensor] = {}
        self.where: list[set[torch.device]] = []

    def on_fit_start(self, trainer: Any, module: nn.Module) -> None:  # type: ignore[override]
        self.shadow = {name: p.data.to(self.device, copy=True) for name, p in module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: nn.Module, *rest: Any) -> None:  # type: ignore[override]
        torch._foreach_lerp_(list(self.shadow.values()), [p.data for p in module.parameters()], 0.1)

    def on_validation_start(self, trainer: Any, module: nn.Module) -> None:  # type: ignore[override]
        for name, parameter in module.named_parameters():
            self.backup[name] = parameter.data
            parameter.data = self.shadow[name]
        self.where.append({parameter.device for parameter in module.parameters()})

    def on_validation_end(self, trainer: Any, module: nn.Module) -> None:  # type: ignore[override]
        for name, parameter in module.named_parameters():
            parameter.data = self.backup[name]


class Shrink(pl.Callback):
    """Makes all weights smaller after each batch, as one vector."""

    def on_train_batch_end(self, trainer: Any, module: nn.Module, *rest: Any) -> None:  # type: ignore[override]
        vector_to_parameters(0.99 * parameters_to_vector(module.parameters()), module.parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("make", [Average, lambda _: Shrink()], ids=["average", "vector"])
def test_weights_are_those_of_one_device(
    make: Callable[[str], pl.Callback],
    micro_batches: int,
    plain: Any,
    hetero: Any,
    accelerator: EmulatedAccelerator,
) -> None:
    runs = []
    for make_trainer, device in ((plain, "cpu"), (hetero, accelerator.devices[1])):
        options = {} if make_trainer is plain else {"strategy": {"micro_batches": micro_batches}}
        module, callback = Classifier(), make(device)
        trainer = make_trainer(callbacks=[callback], max_epochs=1, num_sanity_val_steps=0, **options)
        trainer.fit(module, data(), data())
        runs.append((module, float(trainer.callback_metrics["val_loss"]), callback))
    (alone, loss, _), (placed, same_loss, callback) = runs
    assert difference(alone, placed) <= 1e-12
    assert abs(loss - same_loss) <= 1e-12
    assert not isinstance(callback, Average) or len(callback.where[0]) == 3
