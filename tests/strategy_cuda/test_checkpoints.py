"""What was trained on a GPU and the CPU goes on anywhere, and on the same devices as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier, adam, data, difference

BOUND = 1e-12  # in float64, with SGD


class Drops(Classifier):
    """Draws random numbers on every device."""

    def __init__(self, make_optimizer: Any = adam) -> None:
        super().__init__("mlp", make_optimizer)
        self.net.second = nn.Sequential(self.net.second, nn.Dropout(0.2))
        self.net.third = nn.Sequential(nn.Dropout(0.2), self.net.third)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def devices_in(value: Any) -> set[str]:
    """Types of the devices of all tensors."""
    if isinstance(value, Tensor):
        return {value.device.type}
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return set().union(*map(devices_in, inside))


@pytest.mark.parametrize("where", ["gpu", "cpu"])
def test_plain_lightning_goes_on_with_it(
    where: str, places: list[str], gpu: Any, over: Any, alone: Any, tmp_path: Path
) -> None:
    name, place = "convnet", gpu if where == "gpu" else "cpu"
    whole, first, second = (Classifier(name, sgd) for _ in range(3))
    alone(place, max_epochs=4).fit(whole, data(name))
    trainer = over(places)
    trainer.fit(first, data(name))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    alone(place, max_epochs=4).fit(second, data(name), ckpt_path=tmp_path / "half.ckpt")
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=0, abs=BOUND)
    assert difference(whole, second) <= BOUND


def test_all_tensors_in_the_file_are_on_the_cpu(places: list[str], over: Any, tmp_path: Path) -> None:
    trainer = over(places)
    trainer.fit(Classifier("convnet"), data("convnet"))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert devices_in(torch.load(tmp_path / "it.ckpt", weights_only=True)) == {"cpu"}


@pytest.mark.parametrize(
    "strategy",
    [{}, {"micro_batches": 4}, {"micro_batches": 4, "micro_batching": "step"}],
    ids=["whole", "forward", "step"],
)
def test_the_same_devices_go_on_bit_for_bit(
    strategy: dict[str, Any], places: list[str], over: Any, tmp_path: Path
) -> None:
    """With the random numbers of all devices, and from the file of a callback in the middle of the run."""
    whole, resumed = Drops(), Drops()
    for model, seed, path in ((whole, 3, None), (resumed, 4, tmp_path / "epoch=1.ckpt")):
        torch.manual_seed(seed)
        keeps = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = over(places, strategy=strategy, max_epochs=4, callbacks=[keeps], enable_checkpointing=True)
        trainer.fit(model, data(), ckpt_path=path)
    assert difference(whole, resumed) == 0.0
