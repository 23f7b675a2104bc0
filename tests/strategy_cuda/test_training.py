"""What Lightning does around a step, over a GPU and the CPU, against either of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier, data, difference

BOUND = 1e-12  # in float64, with SGD
MICRO_BATCHES = pytest.mark.parametrize("micro_batches", [1, 4])

Check = Callable[..., None]


@pytest.fixture
def check(places: list[str], gpu: Any, over: Any, alone: Any) -> Check:
    """`check(make, loaders, bound, **options)` trains what `make` makes over both devices and on each alone."""

    def run(
        make: Callable[[], Any],
        *loaders: Any,
        micro_batches: int = 1,
        callbacks: Callable[[], list[Any]] = list,
        bound: float = BOUND,
        **options: Any,
    ) -> None:
        spread = make()
        trainer = over(places, strategy={"micro_batches": micro_batches}, callbacks=callbacks(), **options)
        trainer.fit(spread, *loaders)
        assert {stage.device for stage in trainer.strategy.plan.stages} == set(places)
        for where in (gpu, "cpu"):
            single = make()
            alone(where, callbacks=callbacks(), **options).fit(single, *loaders)
            assert difference(spread, single) <= bound, where

    return run


def convnet() -> Classifier:
    return Classifier("convnet", sgd)


@MICRO_BATCHES
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["accumulate", "norm", "value"],
)
def test_gradients_are_accumulated_and_clipped(options: dict[str, Any], micro_batches: int, check: Check) -> None:
    check(lambda: Classifier("mlp", sgd), data(), micro_batches=micro_batches, **options)


class Gan(pl.LightningModule):
    """Manual optimization: two optimizers, toggled; the generator is called for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 1)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        noise = real.roll(1, 0).contiguous()
        self.toggle_optimizer(first)
        scores = self.discriminator(self.generator(noise))
        first.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores)))
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self.discriminator(self.generator(noise).detach())
        second.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(real)).mean() + F.softplus(fake).mean())
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [sgd(self.generator.parameters()), sgd(self.discriminator.parameters())]


@MICRO_BATCHES
def test_a_gan_with_manual_optimization(micro_batches: int, check: Check) -> None:
    check(Gan, data(), micro_batches=micro_batches)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
        lambda: EMAWeightAveraging(decay=0.9, use_buffers=True),
        lambda: EMAWeightAveraging(decay=0.9, use_buffers=True, device=None),
    ],
    ids=["SWA", "EMA", "EMA-on-root"],
)
def test_averages_of_weights(make: Callable[[], Any], check: Check) -> None:
    loaders = data("convnet"), data("convnet")
    check(convnet, *loaders, callbacks=lambda: [make()], max_epochs=3)


OPTIMIZERS: dict[str, Any] = {
    "SGD-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}
AVERAGED = 1e-8  # steps divided by the root of squared gradients make more of rounding; see test_cuda.py


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_over_both_kinds_of_devices(name: str, check: Check) -> None:
    bound = BOUND if name.startswith("SGD") else AVERAGED
    check(lambda: Classifier("mlp", OPTIMIZERS[name]), data(), bound=bound)


def test_an_optimizer_for_cuda_graphs_is_refused_beside_the_cpu(places: list[str], over: Any) -> None:
    model = Classifier("mlp", lambda p: torch.optim.Adam(p, lr=1e-2, capturable=True))
    with pytest.raises(UnsupportedError, match=r"Adam\(capturable=True\) is for CUDA graphs.*Leave out capturable"):
        over(places).fit(model, data())


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")  # it is not captured here
def test_an_optimizer_for_cuda_graphs_works_on_the_gpu_alone(over: Any, quiet: dict[str, Any]) -> None:
    def make() -> Classifier:
        return Classifier("mlp", lambda p: torch.optim.Adam(p, lr=1e-2, capturable=True))

    spread, single = make(), make()
    trainer = over(["cuda:0", "cpu"], strategy={"placement": "single"})
    trainer.fit(spread, data())
    assert trainer.strategy.plan.torch_devices == ("cuda:0",)
    pl.Trainer(**{**quiet, "max_epochs": 2, "accelerator": "gpu", "devices": 1}).fit(single, data())
    assert difference(spread, single) == 0.0
