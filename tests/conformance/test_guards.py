"""What cannot be meant is answered by an error that says what was probably meant."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import Tensor

from lightning_hetero import HeteroStrategy
from lightning_hetero.errors import InventoryError, UnknownArgumentError, UsageError
from lightning_hetero.testing.lightning_module import Classifier, data

somewhere = pytest.mark.parametrize("devices", ["accelerator"], indirect=True)


@pytest.mark.feature("guards: unknown arguments of HeteroStrategy", "refused", "The nearest name is suggested.")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"placment": "even"}, r"HeteroStrategy has no argument 'placment'. Did you mean 'placement'\? Its arguments"),
        ({"microbatches": 4}, r"no argument 'microbatches'. Did you mean 'micro_batches'\?"),
        ({"zzz": 4}, r"no argument 'zzz'. Its arguments are: devices, placement, memory"),
    ],
)
def test_unknown_arguments(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnknownArgumentError, match=says) as caught:
        HeteroStrategy(**given)
    assert isinstance(caught.value, TypeError)
    assert "placement" in inspect.signature(HeteroStrategy).parameters  # what tools read is as it was


@pytest.mark.feature("guards: a misspelt strategy", "refused", "By Lightning.")
def test_a_misspelt_strategy(quiet: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='hetro'`"):
        pl.Trainer(**quiet, strategy="hetro")


@pytest.mark.feature("guards: devices that are not there", "refused", "What exists is listed.")
@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ("toaster", "unknown device 'toaster'. Available: dev:0"),
        ("cpu,cpu", "device 'cpu' is asked for twice"),
        (["cpu", "dev:9"], "device 'dev:9' is not available"),
        ({"cpu": "much"}, "'much'"),
        (99, "99 devices are asked for, but there are"),
        (-7, "-7 is not a number of devices"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("accelerator")
def test_devices_that_are_not_there(devices: Any, says: str, quiet: dict[str, Any]) -> None:
    with pytest.raises(InventoryError, match=says):
        pl.Trainer(**quiet, strategy=HeteroStrategy(devices=devices))
    with pytest.raises(InventoryError, match=says):
        pl.Trainer(**quiet, strategy="hetero", accelerator="hetero", devices=devices)


@somewhere
@pytest.mark.feature("guards: one HeteroStrategy object in two runs at the same time", "refused")
@pytest.mark.parametrize("made", ["before", "during"])
def test_a_strategy_that_is_in_use(made: str, hostile: Any, quiet: dict[str, Any], plain: Any) -> None:
    def another(strategy: HeteroStrategy) -> pl.Trainer:
        return pl.Trainer(**quiet, strategy=strategy, max_epochs=1)

    class Nests(Classifier):
        other: Any = None

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0:
                with pytest.raises(
                    UsageError, match=r"has placed the Nests of a run that is still going on. Make a Hete"
                ):
                    (self.other or another(self.trainer.strategy)).fit(Classifier(), data())

    model, alone, trainer = Nests(), Classifier(), hostile()
    if made == "before":
        model.other = another(trainer.strategy)
    trainer.fit(model, data())
    plain().fit(alone, data())
    assert model.losses == alone.losses  # the run goes on as if nothing had been


@somewhere
@pytest.mark.feature("guards: one HeteroStrategy object in one run after the other", "works")
def test_a_strategy_that_was_in_use(hostile: Any, quiet: dict[str, Any]) -> None:
    class Fails(Classifier):
        def on_train_epoch_end(self) -> None:
            raise KeyError("the user's own")

    trainer, model = hostile(), Classifier()
    with pytest.raises(KeyError):
        trainer.fit(Fails(), data())
    pl.Trainer(**quiet, strategy=trainer.strategy, max_epochs=1).fit(model, data())
    assert len(model.losses) == 5


@somewhere
@pytest.mark.feature("guards: moving modules in hooks", note="Ignored with a warning; a change of dtype takes effect.")
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_start", "on_validation_start"])
def test_moves_in_hooks(hook: str, both: Any) -> None:
    class Moves(Classifier):
        pass

    def move(self: Classifier, *_: Any) -> None:
        self.to("cpu")
        self.net.second.cpu()

    setattr(Moves, hook, move)
    with pytest.warns(UserWarning, match="stays where the plan placed it"):
        both(Moves, run=lambda trainer, model: trainer.fit(model, data(), data())).check_parity()


@pytest.mark.feature("guards: notebooks")
def test_notebooks(hostile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    trainer, model = hostile(), Classifier()
    trainer.fit(model, data())
    assert trainer.strategy.launcher is None
    assert len(model.losses) == 10


@somewhere
@pytest.mark.feature("guards: tensors of a user on another device than the root")
def test_tensors_made_on_a_device_of_the_users_choice(both: Any) -> None:
    class Makes(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            noise = torch.linspace(0, 1, 8, dtype=torch.float64, device=self.net.third.weight.device)
            return super().training_step([batch[0] + noise, batch[1]], batch_idx)

    both(Makes).check_parity()
