"""A GPU and the CPU share the rows of a batch, unequally, and train the model of either of them alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F
from torch import Tensor

from lightning_hetero.graph.find import find_units
from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier, data, difference

BOUND = 1e-12  # in float64, with SGD
STEP = {"micro_batching": "step", "schedule": "1f1b", "micro_batches": 4}


class Quiet(Classifier):
    """Keeps no list of losses: what goes from one micro-batch to the next makes steps run one after the other."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Rows(pl.Callback):
    """Counts how many micro-batches each device had."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.block = trainer.strategy.recording()
        self.recording = self.block.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.block.__exit__(None, None, None)
        self.parts += Counter(record.device for record in self.recording.records if record.op == "F")


@pytest.mark.parametrize("shares", [(3, 1), (1, 2)], ids=["3:1", "1:2"])
@pytest.mark.parametrize("name", ["mlp", "tied_transformer", "recurrent"])
def test_the_whole_model_on_both(
    name: str, shares: tuple[int, int], places: list[str], gpu: Any, over: Any, alone: Any
) -> None:
    rows, spread = Rows(), Classifier(name, sgd)
    placement = {"": dict(zip(places, shares, strict=True))}
    trainer = over(places, strategy={"placement": placement}, callbacks=[rows])
    trainer.fit(spread, data(name, rows=42))  # the last batch has two rows
    assert set(rows.parts) == set(places)
    for where in (gpu, "cpu"):
        single = Classifier(name, sgd)
        alone(where).fit(single, data(name, rows=42))
        assert spread.losses == pytest.approx(single.losses, rel=0, abs=BOUND), where
        assert difference(spread, single) <= BOUND, where


@pytest.mark.parametrize("strategy", [{"micro_batches": 4}, STEP], ids=["forward", "step"])
@pytest.mark.parametrize("owner", ["gpu", "cpu"])
def test_a_stage_with_replicas_behind_one_without(
    owner: str, strategy: dict[str, Any], places: list[str], gpu: Any, over: Any, alone: Any
) -> None:
    name = "tied_transformer"
    first, *_ = find_units(Classifier(name)).names
    placement = {first: gpu.name if owner == "gpu" else "cpu", "": dict(zip(places, (3, 1), strict=True))}
    rows, spread = Rows(), Quiet(name, sgd)
    over(places, strategy={"placement": placement, **strategy}, callbacks=[rows]).fit(spread, data(name))
    assert set(rows.parts) == set(places)
    for where in (gpu, "cpu"):
        single = Quiet(name, sgd)
        alone(where).fit(single, data(name))
        assert difference(spread, single) <= BOUND, where


def test_copies_follow_the_optimizer_and_a_checkpoint(
    places: list[str], gpu: Any, over: Any, alone: Any, tmp_path: Any
) -> None:
    placement = {"": dict(zip(places, (3, 1), strict=True))}
    whole, first, second = (Classifier("mlp", sgd) for _ in range(3))
    alone(gpu, max_epochs=4).fit(whole, data())
    trainer = over(places, strategy={"placement": placement})
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = over(places, strategy={"placement": placement}, max_epochs=4)
    resumed.fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert difference(whole, second) <= BOUND
