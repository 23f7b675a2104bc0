"""The contract: whatever the placement, a run gives the numbers of one device."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference
from lightning_hetero.testing.models import MODELS

# Models whose tied weight or glue code sums gradients of several devices in another order than one device does.
SUMS_IN_ANOTHER_ORDER = {"tied_transformer", "borrower", "attention", "recurrent"}


@pytest.mark.parametrize("rotation", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_adam_give_the_parameters_of_one_device(
    name: str, rotation: int, plain: Any, hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    places = ["cpu", *accelerator.devices[:2]]
    alone, spread = Classifier(name), Classifier(name)
    plain().fit(alone, data(name))
    trainer = hetero(devices=places[rotation:] + places[:rotation])
    trainer.fit(spread, data(name))
    assert len(trainer.strategy.plan.used) > 1
    assert len(spread.losses) == 10
    bound = 1e-9 if name in SUMS_IN_ANOTHER_ORDER else 0.0
    assert difference(alone, spread) <= bound


@pytest.mark.parametrize(
    "placement", ["auto", "single", "even", "memory_first", "round_robin", {"net.first": "cpu", "": "auto"}]
)
def test_every_policy_gives_the_numbers_of_one_device(placement: Any, plain: Any, hetero: Any) -> None:
    alone, spread = Classifier(), Classifier()
    plain().fit(alone, data(), data())
    hetero(placement=placement).fit(spread, data(), data())
    assert difference(alone, spread) == 0.0
    assert spread.losses == alone.losses


@pytest.mark.feature("loops: fit, validate, test and predict, one after the other, and fit again")
def test_validation_test_and_prediction_equal_those_of_one_device(plain: Any, hetero: Any) -> None:
    results = []
    for make in (plain, hetero):
        model, trainer = Classifier("convnet"), make()
        trainer.fit(model, data("convnet"), data("convnet"))
        fitted = dict(trainer.callback_metrics)
        validated = trainer.validate(model, data("convnet"), verbose=False)
        tested = trainer.test(model, data("convnet"), verbose=False)
        predicted = torch.cat(trainer.predict(model, data("convnet")))
        assert predicted.device.type == "cpu"
        results.append((fitted, validated, tested, predicted.tolist()))
    assert results[0] == results[1]


class Gan(pl.LightningModule):
    """Manual optimization: two optimizers, the generator called for both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).double()
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(inplace=True), nn.Linear(16, 1)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        noise = torch.linspace(-1, 1, real.numel(), dtype=real.dtype, device=self.device).reshape(real.shape)
        ones = torch.ones(len(real), 1, dtype=real.dtype, device=self.device)
        self.toggle_optimizer(first)
        loss = F.binary_cross_entropy_with_logits(self.discriminator(self.generator(noise)), ones)
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self.discriminator(self.generator(noise).detach())
        loss = F.binary_cross_entropy_with_logits(self.discriminator(real), ones) + F.softplus(fake).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-2),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-2),
        ]


@pytest.mark.feature("optimizers: several, toggled, with clipping and schedulers")
@pytest.mark.parametrize("rotation", range(3))
def test_a_gan_with_manual_optimization_trains_as_on_one_device(
    rotation: int, plain: Any, hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    places = ["cpu", *accelerator.devices[:2]]
    alone, spread = Gan(), Gan()
    plain().fit(alone, data())
    hetero(devices=places[rotation:] + places[:rotation]).fit(spread, data())
    assert difference(alone, spread) == 0.0


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.feature("optimizers: every optimizer of torch.optim, also foreach and fused")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_trains_as_on_one_device(name: str, plain: Any, hetero: Any) -> None:
    alone, spread = Classifier("mlp", OPTIMIZERS[name]), Classifier("mlp", OPTIMIZERS[name])
    options = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    plain(**options).fit(alone, data())
    hetero(**options).fit(spread, data())
    assert difference(alone, spread) <= 1e-15


@pytest.mark.feature("optimizers: made in the constructor of the module")
def test_an_optimizer_made_in_the_constructor_trains_the_placed_model(plain: Any, hetero: Any) -> None:
    class Early(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.Adam(self.parameters(), lr=1e-2)

        def configure_optimizers(self) -> Any:
            return self.early

    alone, spread = Early(), Early()
    for _ in range(2):  # the second fit finds state in the optimizer
        plain().fit(alone, data())
        hetero().fit(spread, data())
        assert difference(alone, spread) == 0.0


@pytest.mark.feature("loops: fit again under another placement")
@pytest.mark.parametrize("placements", list(itertools.permutations(["even", "round_robin", "single"], 2)))
def test_fit_again_with_another_placement_goes_on_where_it_was(
    placements: tuple[str, str], plain: Any, hetero: Any
) -> None:
    alone, spread = Classifier(), Classifier()
    for placement in placements:
        plain().fit(alone, data())
        hetero(placement=placement).fit(spread, data())
    assert difference(alone, spread) == 0.0


def test_emulated_devices_give_the_numbers_of_one_device(plain: Any, hetero: Any) -> None:
    alone, spread = Classifier("convnet"), Classifier("convnet")
    plain().fit(alone, data("convnet"))
    hetero(devices="cpu@speed=1,mem=1GiB,cpu@speed=0.9,mem=1GiB,threads=1").fit(spread, data("convnet"))
    assert difference(alone, spread) == 0.0
