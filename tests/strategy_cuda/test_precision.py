"""Each precision is entered on both devices, trains, and goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hetero.strategy.grad_scaler import DeviceGradScaler
from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier, data, difference

# What layers compute in, and what their weights are in.
PRECISIONS = {
    "bf16-mixed": (torch.bfloat16, torch.float32),
    "16-mixed": (torch.half, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.half, torch.half),
    "64-true": (torch.float64, torch.float64),
}
MICRO_BATCHES = pytest.mark.parametrize("micro_batches", [1, 4])

# What Lightning's own scaler says where there is no CUDA; ours takes its place.
pytestmark = pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")


class Watched(nn.Linear):
    """Notes on which kind of device it runs, what it computes, and whether autocast is on there."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        seen: set[tuple[str, torch.dtype, bool]] = set()
        self.note, self.seen = seen.add, lambda: set(seen)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.note((y.device.type, y.dtype, torch.is_autocast_enabled(y.device.type)))
        return y


class Learns(Classifier):
    """Three layers in float32, unless the precision says otherwise, for classes that follow from the inputs."""

    def __init__(self, make_optimizer: Any = sgd) -> None:
        super().__init__("mlp", make_optimizer)
        torch.manual_seed(0)
        layers = Watched(8, 32), nn.Tanh(), Watched(32, 32), nn.Tanh(), Watched(32, 4)
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(self.net[0].weight.dtype)
        loss = F.cross_entropy(self(x).float(), batch[0][:, :4].argmax(1))
        self.losses.append(loss.item())
        return loss

    @property
    def seen(self) -> set[Any]:
        """What the layers noted."""
        return set().union(*(layer.seen() for layer in self.net if isinstance(layer, Watched)))


def options(precision: str, gpu: Any) -> dict[str, Any]:
    """Of the Trainer. With its own accelerator for the CPU, Lightning makes bfloat16 of 16-mixed."""
    return {"precision": precision, **({} if gpu.is_real else {"accelerator": "hetero"})}


@MICRO_BATCHES
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_compute_in_it_on_both_devices_and_learn(
    precision: str, micro_batches: int, places: list[str], gpu: Any, over: Any
) -> None:
    model = Learns()
    trainer = over(places, strategy={"micro_batches": micro_batches}, max_epochs=8, **options(precision, gpu))
    trainer.fit(model, data())
    computed, stored = PRECISIONS[precision]
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    assert model.seen == {(kind, computed, precision.endswith("mixed")) for kind in (gpu.kind, "cpu")}
    if precision == "16-mixed":
        assert isinstance(trainer.precision_plugin.scaler, DeviceGradScaler)
    assert statistics.mean(model.losses[-5:]) < 0.7 * statistics.mean(model.losses[:5])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    precision: str, places: list[str], gpu: Any, over: Any, tmp_path: Path
) -> None:
    # Lightning reads weights before it converts the module, so one in float32 would round those in float64.
    whole, first, second = Learns(), Learns(), Learns().to(PRECISIONS[precision][1])
    over(places, max_epochs=4, **options(precision, gpu)).fit(whole, data())
    trainer = over(places, max_epochs=2, **options(precision, gpu))
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    over(places, max_epochs=4, **options(precision, gpu)).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    assert difference(whole, second) == 0.0


@MICRO_BATCHES
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_scaled_gradients_are_clipped_and_accumulated(
    fused: bool, micro_batches: int, places: list[str], gpu: Any, over: Any
) -> None:
    """The same as on the GPU alone, to the rounding of float16; fused optimizers do not allow clipping."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, fused=fused)

    chosen = {**options("16-mixed", gpu), "accumulate_grad_batches": 2}
    chosen |= {} if fused else {"gradient_clip_val": 0.5}
    trained = []
    for strategy in ({"placement": "single"}, {"micro_batches": micro_batches}):
        trained.append(Learns(make))
        over([gpu.name, "cpu"] if strategy.get("placement") else places, strategy=strategy, **chosen).fit(
            trained[-1], data()
        )
    assert trained[0].losses == pytest.approx(trained[1].losses, rel=0, abs=0.01)
    # Six steps of 0.1; gradients are below 1 and rounded to eleven bits a few times on their way.
    assert difference(*trained) <= 6 * 0.1 * 4 * torch.finfo(torch.half).eps
