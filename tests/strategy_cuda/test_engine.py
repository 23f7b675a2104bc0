"""Batches in micro-batches over a GPU and the CPU give the numbers of either of them alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier, data, difference

BOUND = 1e-12  # in float64, with SGD
ROWS = 42  # the last batch has two rows, fewer than micro-batches
FORWARD = {"micro_batches": 4}
STEP = {"micro_batches": 4, "micro_batching": "step"}
SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b"]


class Calls(pl.Callback):
    """Counts calls that ran in micro-batches, and which devices worked on them in the last batch of the first epoch."""

    def __init__(self) -> None:
        self.cut = 0
        self.devices: set[str] = set()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.block = trainer.strategy.recording()
        self.recording = self.block.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.block.__exit__(None, None, None)
        self.devices |= {record.device for record in self.recording.records}
        self.cut = trainer.strategy._placed.engine.cut_calls


class Quiet(Classifier):
    """Keeps no list of losses: what goes from one micro-batch to the next makes steps run one after the other."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("rematerialize", [False, True], ids=["", "rematerialize"])
@pytest.mark.parametrize("name", ["mlp", "tied_transformer", "recurrent"])
def test_calls_in_micro_batches(
    name: str, rematerialize: bool, places: list[str], gpu: Any, over: Any, alone: Any
) -> None:
    calls, spread = Calls(), Classifier(name, sgd)
    options = {**FORWARD, "rematerialize": rematerialize}
    over(places, strategy=options, callbacks=[calls]).fit(spread, data(name, rows=ROWS))
    assert calls.cut >= 10
    assert calls.devices == set(places)
    for where in (gpu, "cpu"):
        single = Classifier(name, sgd)
        alone(where).fit(single, data(name, rows=ROWS))
        assert spread.losses == pytest.approx(single.losses, rel=0, abs=BOUND), where
        assert difference(spread, single) <= BOUND, where


def test_batch_normalisation_sees_whole_batches(places: list[str], gpu: Any, over: Any, alone: Any) -> None:
    spread = Classifier("convnet", sgd)
    over(places, strategy=FORWARD).fit(spread, data("convnet", rows=ROWS), data("convnet", rows=ROWS))
    for where in (gpu, "cpu"):
        single = Classifier("convnet", sgd)
        alone(where).fit(single, data("convnet", rows=ROWS), data("convnet", rows=ROWS))
        assert difference(spread, single) <= BOUND, where


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_whole_steps_in_micro_batches(
    name: str, schedule: str, places: list[str], gpu: Any, over: Any, alone: Any
) -> None:
    """Accumulation over the same micro-batches, batch statistics included."""
    calls, spread = Calls(), Quiet(name, sgd)
    over(places, strategy={**STEP, "schedule": schedule}, callbacks=[calls]).fit(spread, data(name))
    assert calls.devices == set(places)
    for where in (gpu, "cpu"):
        single = Quiet(name, sgd)
        alone(where, accumulate_grad_batches=4).fit(single, data(name, batch_size=2))
        assert difference(spread, single) <= BOUND, where


def test_whole_steps_of_an_uneven_last_batch(places: list[str], gpu: Any, over: Any, alone: Any) -> None:
    """26 rows in batches of 10, 10 and 6; each loss counts by its rows."""
    spread = Quiet("mlp", sgd)
    over(places, strategy=STEP).fit(spread, data(rows=26, batch_size=10))
    for where in (gpu, "cpu"):
        single = Quiet("mlp", sgd)
        alone(where).fit(single, data(rows=26, batch_size=10))
        assert difference(spread, single) <= BOUND, where


class Drops(Quiet):
    """Dropout on both devices, and random numbers of the step's own code."""

    def __init__(self) -> None:
        super().__init__("mlp", sgd)
        self.net = nn.Sequential(*(self._layer(width) for width in (8, 16, 16)), nn.Linear(16, 4)).double()

    @staticmethod
    def _layer(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Dropout(0.3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + torch.rand((), device=loss.device))


@pytest.mark.parametrize(
    "strategy",
    [{"micro_batches": 1}, FORWARD, {**FORWARD, "rematerialize": True}, STEP, {"activation_checkpointing": True}],
    ids=["whole", "forward", "rematerialize", "step", "checkpointing"],
)
def test_runs_with_dropout_are_equal_bit_for_bit(strategy: dict[str, Any], places: list[str], over: Any) -> None:
    trained = []
    for seed in (5, 5, 6):
        model = Drops()
        pl.seed_everything(seed, verbose=False)
        over(places, strategy=strategy).fit(model, data())
        trained.append(model)
    assert difference(trained[0], trained[1]) == 0.0
    assert difference(trained[0], trained[2]) > 1e-6  # random numbers are drawn at all


@pytest.mark.parametrize("option", [{"rematerialize": True, **FORWARD}, {"activation_checkpointing": True}], ids=str)
def test_forwards_that_run_again_draw_the_same_numbers(option: dict[str, Any], places: list[str], over: Any) -> None:
    trained = []
    for strategy in (option, {**option, **dict.fromkeys(("rematerialize", "activation_checkpointing"), False)}):
        model = Drops()
        pl.seed_everything(5, verbose=False)
        over(places, strategy=strategy).fit(model, data())
        trained.append(model)
    assert difference(*trained) <= BOUND
