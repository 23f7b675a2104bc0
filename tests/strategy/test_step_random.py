"""Random numbers of whole training steps in micro-batches: a first step, which is a rehearsal, draws as any other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.testing.accelerator import EmulatedAccelerator

EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
STEP = {"strategy": {"micro_batches": 4, "micro_batching": "step"}, "max_epochs": 1}
ROWS = 8
MASKS: list[Tensor] = []  # of the present step
Step = Callable[["Model", Tensor], Tensor]


class Noise(nn.Module):
    """A unit that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.mask(x)  # type: ignore[no-any-return]

    def mask(self, x: Tensor) -> Tensor:
        return F.dropout(torch.ones_like(x), 0.5)


class Notes(Noise):
    """Notes what it drew."""

    def mask(self, x: Tensor) -> Tensor:
        MASKS.append(super().mask(x).detach())
        return MASKS[-1]


class Model(pl.LightningModule):
    """Every batch is the same and nothing is learnt, so steps differ by their random numbers only."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(Noise(), nn.Tanh(), Noise(), nn.Linear(6, 6), nn.Dropout(0.5)).double()
        self.step = step
        self.losses: list[float] = []
        self.after: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step(self, batch[0]).square().mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        MASKS.clear()
        begin()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        self.after.append(torch.rand(()).item())  # where the generator has come to

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self) -> Any:
        rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return DataLoader(TensorDataset(rows.repeat(4, 1)), batch_size=ROWS)


def begin() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def whole(model: Model, x: Tensor) -> Tensor:
    output: Tensor = model.net(x + torch.randn_like(x))
    return output + torch.rand((), dtype=x.dtype, device=x.device)


def units_only(model: Model, x: Tensor) -> Tensor:
    output: Tensor = model.net(x)
    return output


def without_gradients(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = model.net[2](x)
    output: Tensor = model.net[3](x) - target
    return output


def nothing(model: Model, x: Tensor) -> Tensor:
    output: Tensor = model.net.eval()[3](x)
    return output


@pytest.mark.parametrize(
    ("step", "first"),
    list(itertools.product((whole, units_only, without_gradients, nothing), (None, 0, 1, 2))),
)
def test_the_first_step_has_the_numbers_of_the_next_one(
    step: Step, first: int | None, hetero: Any, accelerator: EmulatedAccelerator, caplog: pytest.LogCaptureFixture
) -> None:
    places = ["cpu", *accelerator.devices[:2]]
    devices = EMULATED if first is None else places[first:] + places[:first]
    model = Model(step)
    hetero(devices=devices, **STEP).fit(model)
    assert "run one after the other" not in caplog.text
    assert len(set(model.losses)) == len(set(model.after)) == 1
    begin()
    assert (model.after[0] == torch.rand(()).item()) == (step is nothing)  # one number is drawn for a seed


def on_the_cpu(model: Model, x: Tensor) -> Tensor:
    output: Tensor = model.net(x * torch.rand((), dtype=x.dtype))
    return output


def from_python(model: Model, x: Tensor) -> Tensor:
    output: Tensor = model.net(x * random.random())
    return output


def from_numpy(model: Model, x: Tensor) -> Tensor:
    output: Tensor = model.net(x * float(np.random.rand()))
    return output


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (on_the_cpu, "its code draws random numbers on cpu, off its own device"),
        (from_python, "it draws random numbers from Python's random"),
        (from_numpy, "it draws random numbers from numpy.random"),
    ],
)
def test_what_lanes_would_draw_in_no_certain_order_is_drawn_in_turn(
    step: Step, reason: str, hetero: Any, accelerator: EmulatedAccelerator, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(step)
    hetero(devices=accelerator.devices[:2], **STEP).fit(model)
    assert f"run one after the other, because {reason}" in caplog.text
    assert len(set(model.losses)) == len(set(model.after)) == 1


@pytest.mark.parametrize("devices", [EMULATED, None])
def test_units_that_run_again_for_the_backward_draw_the_same_numbers(
    devices: str | None, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[list[Tensor]] = []

    class Keeps(Model):
        def __init__(self) -> None:
            super().__init__(again)
            self.net[2] = Notes().double()

        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(list(MASKS))

    def again(model: Model, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        output: Any = checkpoint(model.net[2], x, use_reentrant=False)
        return model.net[3](output)  # type: ignore[no-any-return]

    hetero(devices=devices, **STEP).fit(Keeps())
    assert "run one after the other, because net.2 draws random numbers" in caplog.text
    for masks in seen:
        assert len(masks) == 2 * 4
        for forward, backward in zip(masks[::2], masks[1::2], strict=True):
            assert torch.equal(forward, backward)
        assert not torch.equal(masks[0], masks[2])
    assert all(torch.equal(a, b) for masks in seen[1:] for a, b in zip(seen[0], masks, strict=True))


def test_own_code_that_runs_again_for_the_backward_draws_the_same_numbers(
    hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def own(x: Tensor) -> Tensor:
        drawn.append(torch.rand_like(x))
        return x * drawn[-1]

    def again(model: Model, x: Tensor) -> Tensor:
        output: Any = checkpoint(own, model.net[3](x), use_reentrant=False)
        return model.net[1](output)  # type: ignore[no-any-return]

    drawn: list[Tensor] = []
    hetero(devices=EMULATED, **STEP).fit(Model(again))
    assert "because its code draws random numbers under activation checkpointing" in caplog.text
    assert len(drawn) == 4 * 4 * 2
    assert all(torch.equal(*pair) for pair in zip(drawn[::2], drawn[1::2], strict=True))


def test_who_begins_to_draw_is_seen(hetero: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A run that resumes after that has the same numbers: its first step sees it too."""

    class Later(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            self.step = units_only if batch_idx > 0 else nothing
            self.net.train()

    model = Later(nothing)
    hetero(devices=EMULATED, **STEP).fit(model)
    begun = Model(units_only)
    hetero(devices=EMULATED, **STEP).fit(begun)
    assert model.losses[2:] == begun.losses[2:]
    assert model.losses[0] != model.losses[2]
