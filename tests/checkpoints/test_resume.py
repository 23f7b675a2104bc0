"""A run that stops and goes on from its checkpoint has the same parameters, bit for bit, as one that never stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.strategy.random_state import random_state, restore_random_state
from lightning_hetero.testing.accelerator import EmulatedAccelerator

MakeTrainer = Callable[..., pl.Trainer]

BATCHES = 15  # of an epoch, so that half of the 40 steps end in the middle of one
STEPS = 40
PLACEMENTS = {
    "round_robin": {"placement": "round_robin"},
    "even": {"placement": "even"},
    "emulated": {"devices": "cpu@speed=2,cpu@speed=1,cpu@speed=1", "placement": "round_robin"},
    "micro_batches": {"placement": "round_robin", "micro_batches": 2},
    "emulated_micro_batches": {
        "devices": "cpu@speed=2,cpu@speed=1,cpu@speed=1",
        "placement": "round_robin",
        "micro_batches": 2,
    },
    "step": {"placement": "even", "micro_batches": 2, "micro_batching": "step"},
    "emulated_step": {
        "devices": "cpu@speed=2,cpu@speed=1,cpu@speed=1",
        "placement": "round_robin",
        "micro_batches": 3,
        "micro_batching": "step",
    },
    "one_by_one": {"placement": "even", "micro_batches": 2, "micro_batching": "step"},
}


class Noisy(pl.LightningModule):
    """Draws from all generators there are: dropout on every device, and torch, NumPy and Python in the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 12), nn.Dropout(0.2), nn.Linear(12, 12), nn.Tanh(),
            nn.Dropout(0.3), nn.Linear(12, 1),
        ).double()  # fmt: skip
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x) * np.random.rand() * random.gauss(0.1, 0.02)
        loss = F.mse_loss(self.net(x + noise), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class InLanes(Noisy):
    """Draws from torch only, so that micro-batches of whole steps are under way at once."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x + 0.1 * torch.randn_like(x)), y) * (1 + 0.1 * torch.rand((), dtype=x.dtype))
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


def samples() -> TensorDataset:
    x = torch.randn(BATCHES * 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True))


class StatefulLoader:
    """Shuffles with torch's default generator, as `DataLoader` does, and can say where it is."""

    def __init__(self) -> None:
        self.samples = samples()
        self.order: Tensor | None = None
        self.position = 0
        self.goes_on = False

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        torch.empty((), dtype=torch.int64).random_()  # as `DataLoader` does for its workers, whenever it begins
        if not self.goes_on:
            self.order, self.position = torch.randperm(len(self.samples)), 0
        self.goes_on = False
        return self._batches()

    def _batches(self) -> Iterator[list[Tensor]]:
        assert self.order is not None
        while self.position < BATCHES:
            rows = self.order[8 * self.position : 8 * (self.position + 1)]
            self.position += 1
            x, y = self.samples[rows]
            yield [x + 0.01 * torch.rand(()), y]  # augmented while it is loaded

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]
        self.goes_on = self.position < BATCHES


def begin(seed: int) -> None:
    """As a new process that seeds its generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.feature("checkpoints: exact resume within an epoch, with a stateful loader")
@pytest.mark.parametrize("name", PLACEMENTS)
def test_stopped_within_an_epoch_with_a_stateful_loader(
    name: str, hetero: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = InLanes if name.endswith("step") else Noisy

    def trainer(steps: int) -> pl.Trainer:
        return hetero(strategy=PLACEMENTS[name], max_steps=steps, max_epochs=-1)

    whole = kind()
    begin(1)
    trainer(STEPS).fit(whole, StatefulLoader())

    first = kind()
    begin(1)
    started = trainer(STEPS // 2)
    started.fit(first, StatefulLoader())
    started.save_checkpoint(tmp_path / "half.ckpt")
    assert not equal(first, whole)

    resumed = kind()
    begin(2)
    again = trainer(STEPS)
    again.fit(resumed, StatefulLoader(), ckpt_path=tmp_path / "half.ckpt")
    assert again.global_step == STEPS
    assert len(again.strategy.plan.used) > 1
    assert first.losses + resumed.losses == whole.losses
    assert equal(resumed, whole)
    assert ("run one after the other, because" in caplog.text) == (name == "one_by_one")


@pytest.mark.feature("checkpoints: exact resume from ModelCheckpoint's files")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("every", "stateful", "validates"),
    [
        ({"every_n_train_steps": 7}, True, True),
        ({"every_n_train_steps": 7}, True, False),
        ({"every_n_train_steps": BATCHES}, True, False),
        ({"every_n_train_steps": BATCHES}, False, False),
        ({"every_n_epochs": 1}, True, True),
        ({"every_n_epochs": 1}, True, False),
        ({"every_n_epochs": 1}, False, True),
        ({"every_n_epochs": 1}, False, False),
    ],
)
def test_from_every_checkpoint_of_a_run(
    every: dict[str, int], stateful: bool, validates: bool, hetero: MakeTrainer, tmp_path: Path
) -> None:
    def trainer(*callbacks: Any) -> pl.Trainer:
        return hetero(callbacks=list(callbacks), max_epochs=3, enable_checkpointing=bool(callbacks))

    def loaders() -> list[Any]:
        train = StatefulLoader() if stateful else DataLoader(samples(), batch_size=8, shuffle=True)
        return [train, DataLoader(samples(), batch_size=8)] if validates else [train]

    whole = Noisy()
    begin(1)
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **every)
    trainer(keeper).fit(whole, *loaders())
    steps = {int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt")} - {3 * BATCHES}
    assert len(steps) >= 2

    for step in steps:
        resumed = Noisy()
        begin(2)
        trainer().fit(resumed, *loaders(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.losses == whole.losses[step:], step
        assert equal(resumed, whole)


def test_saving_changes_nothing(hetero: MakeTrainer, tmp_path: Path) -> None:
    saving, other = Noisy(), Noisy()
    begin(1)
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    hetero(callbacks=[keeper], enable_checkpointing=True).fit(saving, StatefulLoader())
    begin(1)
    hetero().fit(other, StatefulLoader())
    assert saving.losses == other.losses
    assert equal(saving, other)


def test_a_tuner_that_goes_back_to_its_checkpoint_does_not_go_back_to_old_random_numbers(
    hetero: MakeTrainer, plain: MakeTrainer
) -> None:
    class Tunable(Noisy):
        batch_size = 1

        def train_dataloader(self) -> Any:
            return DataLoader(samples(), batch_size=self.batch_size, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(samples(), batch_size=self.batch_size)

    def losses(make: MakeTrainer, **options: Any) -> list[float]:
        model = Tunable()
        begin(1)
        finder = BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=1)
        make(callbacks=[finder], max_epochs=1, enable_checkpointing=True, **options).fit(model)
        return model.losses

    assert losses(hetero, strategy={"devices": "cpu", "placement": "single"}) == losses(plain)


def test_random_numbers_of_another_number_of_processes_are_not_taken(
    hetero: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = hetero(max_epochs=1)
    started.fit(Noisy(), StatefulLoader())
    started.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    checkpoint["lightning_hetero"]["random_states"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    resumed = Noisy()
    hetero(max_epochs=2).fit(resumed, StatefulLoader(), ckpt_path=tmp_path / "two.ckpt")
    assert len(resumed.losses) == BATCHES
    assert caplog.text.count("holds random numbers for 2 processes, and the run has 1: they begin anew") == 1


def test_states_of_devices_that_are_not_here_are_left_out(accelerator: EmulatedAccelerator) -> None:
    here = [torch.device(name) for name in accelerator.devices[:2]]
    begin(3)
    state = random_state(here)
    assert state["torch"].keys() == {"cpu", *accelerator.devices[:2]}
    expected = [torch.rand(2), torch.rand(2, device=here[0]).cpu(), torch.rand(2, device=here[1]).cpu()]
    numbers = random.gauss(0, 1), np.random.randn()
    begin(4)
    restore_random_state(state, [])
    assert torch.equal(torch.rand(2), expected[0])
    assert not torch.equal(torch.rand(2, device=here[0]).cpu(), expected[1])
    restore_random_state(state, [here[1]])
    assert torch.equal(torch.rand(2, device=here[1]).cpu(), expected[2])
    assert (random.gauss(0, 1), np.random.randn()) == numbers


def test_half_of_a_pair_of_normal_numbers_is_remembered() -> None:
    random.gauss(0, 1)
    np.random.randn()
    state = random_state([])
    expected = random.gauss(0, 1), np.random.randn()
    begin(4)
    restore_random_state(state, [])
    assert (random.gauss(0, 1), np.random.randn()) == expected


def test_the_state_holds_nothing_that_would_have_to_be_trusted(tmp_path: Path) -> None:
    state = random_state([])
    torch.save(state, tmp_path / "state.pt")
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True), [])
    assert (tmp_path / "state.pt").stat().st_size < 32 * 1024
