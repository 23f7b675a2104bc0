"""Predicted memory of schedules of steps against the counters of the emulated accelerator, with the real Trainer."""

from __future__ import annotations

import gc
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroStrategy
from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.plan import Execution
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.simulate import Costs, predict
from lightning_hetero.testing import EmulatedAccelerator
from lightning_hetero.testing.models import Convolutions

pytestmark = [
    pytest.mark.usefixtures("quick_measuring"),  # bytes are asked for here
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
ROWS, WIDTH = 128, 64
SMALL_BYTES = 4096  # numbers and the like, which nobody predicts


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Stack(pl.LightningModule):
    """Blocks, one after the other or in a residual stream on the root."""

    def __init__(self, makers: list[Callable[[], nn.Module]], is_residual: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for make in makers)
        self.is_residual = is_residual

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        for block in self.blocks:
            x = x + block(x) if self.is_residual else block(x)
        return x.square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-6)


class PeaksOfTheEnd(pl.Callback):
    """Beyond what lay there before, in the steps from the fourth on: the first one is a rehearsal."""

    def __init__(self, accelerator: EmulatedAccelerator, before: list[int]) -> None:
        self.accelerator, self.before = accelerator, before
        self.found: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        if index == 3:
            for device in range(2):
                torch.get_device_module(self.accelerator.name).reset_peak_memory_stats(device)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.found = [self.accelerator.stats(index).peak_bytes - used for index, used in enumerate(self.before)]


@pytest.mark.parametrize(
    ("makers", "is_residual", "pattern", "schedule", "micro_batches"),
    [
        ([Convolutions, Convolutions], False, "0", "1f1b", 4),  # on one device a batch is not cut
        ([Convolutions, feed_forward, Convolutions], False, "01", "1f1b", 8),
        ([feed_forward, Convolutions, feed_forward, Convolutions], True, "0101", "interleaved_1f1b", 8),
        ([feed_forward, Convolutions, feed_forward], True, "10", "gpipe", 4),
        ([feed_forward, Convolutions, feed_forward], False, "01", "sequential", 4),
    ],
)
def test_no_step_takes_more_than_predicted(
    makers: list[Callable[[], nn.Module]],
    is_residual: bool,
    pattern: str,
    schedule: str,
    micro_batches: int,
    accelerator: EmulatedAccelerator,
    quiet: dict[str, object],
) -> None:
    accelerator.reset()
    model = Stack(makers, is_residual)
    graph = find_units(model)
    names, devices = graph.names, accelerator.devices[:2]
    device_of = {name: devices[int(pattern[at * len(pattern) // len(names)])] for at, name in enumerate(names)}
    with Recording(model, graph) as recording:
        recording.ends_in(model.training_step([torch.ones(ROWS, WIDTH)], 0))
    inventory = resolve_devices(",".join(devices))
    costs = Costs(graph, inventory, measure_model(recording, inventory, budget_s=2.0))
    expected = predict(costs, device_of, Execution(micro_batches=micro_batches, schedule=schedule)).forecast
    del recording
    gc.collect()

    looks = PeaksOfTheEnd(accelerator, [accelerator.stats(index).used_bytes for index in range(2)])
    strategy = HeteroStrategy(
        devices=[*devices],
        placement=device_of,
        micro_batches=micro_batches,
        micro_batching="step",
        schedule=schedule,
        profile="never",
        verbose=False,
    )
    trainer = pl.Trainer(**{**quiet, "max_epochs": 1, "strategy": strategy, "callbacks": [looks]})  # type: ignore[arg-type]
    trainer.fit(Stack(makers, is_residual), DataLoader(TensorDataset(torch.ones(6 * ROWS, WIDTH)), batch_size=ROWS))
    accelerator.reset()

    by_name = {device.device: device.memory_bytes for device in expected.devices}
    assert max(looks.found) > SMALL_BYTES
    for name, peak in zip(devices, looks.found, strict=True):
        assert peak <= by_name.get(name, 0) + SMALL_BYTES
