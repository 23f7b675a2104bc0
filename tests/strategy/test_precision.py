"""Every precision of Lightning is what it says, on every kind of device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference


class Records(Classifier):
    """Notes the dtype in which each layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.float()
        self.dtypes: dict[str, torch.dtype] = {}
        for name, layer in self.net.named_children():
            layer.register_forward_hook(lambda m, a, out, name=name: self.dtypes.__setitem__(name, out.dtype))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0].to(self.net.first.weight.dtype), batch[1]], batch_idx)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        pytest.param("64-true", torch.float64, marks=pytest.mark.feature("precision: 64-true")),
        pytest.param("32-true", torch.float32, marks=pytest.mark.feature("precision: 32-true")),
        pytest.param("bf16-true", torch.bfloat16, marks=pytest.mark.feature("precision: bf16-true")),
        pytest.param("bf16-mixed", torch.bfloat16, marks=pytest.mark.feature("precision: bf16-mixed")),
    ],
)
def test_every_layer_computes_in_the_dtype_that_was_asked_for(
    precision: str, dtype: torch.dtype, plain: Any, hetero: Any
) -> None:
    alone, spread = Records(), Records()
    plain(precision=precision).fit(alone, data())
    hetero(precision=precision).fit(spread, data())
    assert spread.dtypes == {"first": dtype, "second": dtype, "third": dtype}
    assert spread.dtypes == alone.dtypes
    assert difference(alone, spread) == 0.0


def test_bf16_mixed_on_the_hetero_accelerator_is_not_silently_float32(
    hetero: Any, accelerator: EmulatedAccelerator, quiet: dict[str, Any]
) -> None:
    import lightning.pytorch as pl

    model = Records()
    devices = ["cpu", *accelerator.devices[:2]]
    trainer = pl.Trainer(
        **quiet, accelerator="hetero", devices=devices, strategy="hetero", precision="bf16-mixed", max_epochs=1
    )
    trainer.fit(model, data())
    assert set(model.dtypes.values()) == {torch.bfloat16}
