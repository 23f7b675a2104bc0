"""Micro-batches in the Trainer: every feature gives the numbers of one device, to rounding."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from lightning_hetero.errors import UsageError
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference
from lightning_hetero.testing.models import MODELS

# Adam divides by the root of a gradient's square: where that is small, rounding grows.
ROUNDING = 1e-9
IN_PARTS = {"strategy": {"micro_batches": 4}}


@pytest.mark.parametrize("rotation", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_adam(name: str, rotation: int, plain: Any, hetero: Any, accelerator: EmulatedAccelerator) -> None:
    places = ["cpu", *accelerator.devices[:2]]
    alone, spread = Classifier(name), Classifier(name)
    plain().fit(alone, data(name), data(name))
    trainer = hetero(devices=places[rotation:] + places[:rotation], **IN_PARTS)
    trainer.fit(spread, data(name), data(name))
    assert len(spread.losses) == len(alone.losses)
    assert difference(alone, spread) <= ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})]},
        {"detect_anomaly": True},
        {"precision": "64-true"},
    ],
    ids=" ".join,
)
def test_options_of_the_trainer(options: dict[str, Any], plain: Any, hetero: Any) -> None:
    alone, spread = Classifier(), Classifier()
    plain(**options).fit(alone, data(), data())
    hetero(**IN_PARTS, **options).fit(spread, data(), data())
    assert difference(alone, spread) <= ROUNDING
    assert spread.losses == pytest.approx(alone.losses, abs=ROUNDING)


def test_rematerialization(plain: Any, hetero: Any) -> None:
    alone, spread = Classifier("tied_transformer"), Classifier("tied_transformer")
    plain().fit(alone, data("tied_transformer"))
    hetero(strategy={"micro_batches": 4, "rematerialize": True}).fit(spread, data("tied_transformer"))
    assert difference(alone, spread) <= ROUNDING


def test_the_environment_chooses_without_a_change_of_code(
    monkeypatch: pytest.MonkeyPatch, plain: Any, hetero: Any
) -> None:
    monkeypatch.setenv("HETERO_MICRO_BATCHES", "3")
    alone, spread = Classifier(), Classifier()
    plain().fit(alone, data())
    trainer = hetero()
    trainer.fit(spread, data())
    assert 0.0 < difference(alone, spread) <= ROUNDING  # the sums were made in parts


def test_the_step_runs_once_on_the_whole_batch_and_logs_once(hetero: Any) -> None:
    sizes: list[int] = []
    threads: set[str] = set()

    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sizes.append(len(batch[0]))
            loss: Tensor = super().training_step(batch, batch_idx)
            threads.update(thread.name for thread in threading.enumerate())
            return loss

    hetero(max_epochs=1, **IN_PARTS).fit(Watched(), data())
    assert max(sizes) == len(next(iter(data()))[0])
    assert {name for name in threads if name.startswith("hetero-worker")} >= {"hetero-worker-cpu"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hetero")]


def test_a_forward_that_couples_rows_from_some_epoch_on(plain: Any, hetero: Any) -> None:
    class Centred(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y - y.mean(0) if self.current_epoch > 0 else y

    alone, spread = Centred(), Centred()
    plain(max_epochs=3).fit(alone, data())
    hetero(max_epochs=3, **IN_PARTS).fit(spread, data())
    assert difference(alone, spread) <= ROUNDING


@pytest.mark.parametrize("rule", ["current_epoch > 4", "global_step >= 10"])
def test_a_rule_that_begins_late_in_a_run(rule: str, plain: Any, hetero: Any) -> None:
    class Later(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y - y.mean(0) if self._has_begun() else y

        def _has_begun(self) -> bool:
            return self.current_epoch > 4 if "epoch" in rule else self.global_step >= 10

    alone, spread = Later(), Later()
    plain(max_epochs=7).fit(alone, data())
    hetero(max_epochs=7, **IN_PARTS).fit(spread, data())
    assert difference(alone, spread) <= ROUNDING


def test_a_forward_that_logs_runs_whole(plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Logs(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            self.log("size", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
            return y  # type: ignore[no-any-return]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    results = []
    for trainer in (plain(max_epochs=1), hetero(max_epochs=1, **IN_PARTS)):
        model = Logs()
        trainer.fit(model, data())
        results.append(float(trainer.callback_metrics["size"]))
    assert results[0] == results[1]


def test_one_device_has_nothing_to_overlap_and_says_so(
    plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    alone, spread = Classifier(), Classifier()
    plain().fit(alone, data())
    hetero(placement="single", **IN_PARTS).fit(spread, data())
    assert difference(alone, spread) == 0.0
    assert "micro_batches=4 has no effect: the plan uses one device" in caplog.text


def test_a_model_that_is_compiled_whole_is_not_cut(plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture) -> None:
    alone, spread = Classifier(), Classifier()
    for model in (alone, spread):
        model.compile(backend="eager")
    plain(max_epochs=1).fit(alone, data())
    hetero(max_epochs=1, devices="cpu@speed=1,cpu@speed=1", **IN_PARTS).fit(spread, data())
    assert difference(alone, spread) == 0.0
    assert "because torch.compile has made one piece of it" in caplog.text


def test_manual_optimization_with_a_gradient_penalty(plain: Any, hetero: Any) -> None:
    class Penalised(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.critic = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
            self.maker = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            real = batch[0]
            first, second = self.optimizers()
            self.toggle_optimizer(first)
            fake = self.maker(real.flip(0)).detach().requires_grad_()
            score = self.critic(fake)
            (slope,) = torch.autograd.grad(score.sum(), fake, create_graph=True)
            loss = score.mean() - self.critic(real).mean() + (slope.norm(2, 1) - 1).pow(2).mean()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
            second.zero_grad()
            self.manual_backward(-self.critic(self.maker(real)).mean())
            second.step()
            self.untoggle_optimizer(second)

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.critic, self.maker)]

    alone, spread = Penalised(), Penalised()
    plain().fit(alone, data())
    hetero(**IN_PARTS).fit(spread, data())
    assert difference(alone, spread) <= ROUNDING


def test_an_exception_in_a_part_ends_the_run_and_the_next_one_works(plain: Any, hetero: Any) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)
            self.broken = False

        def forward(self, x: Tensor) -> Tensor:
            if self.broken and threading.current_thread().name.startswith("hetero-worker"):
                raise ValueError("no such thing")
            return self.inner(x)  # type: ignore[no-any-return]

    def model() -> Classifier:
        made = Classifier()
        torch.manual_seed(1)
        made.net.second = Fails().double()
        return made

    spread = model()
    spread.net.second.broken = True
    with pytest.raises(ValueError, match="no such thing") as caught:
        hetero(**IN_PARTS).fit(spread, data())
    assert any(note.startswith("forward of net.second on ") for note in caught.value.__notes__)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hetero")]
    alone, spread = model(), model()
    plain().fit(alone, data())
    hetero(**IN_PARTS).fit(spread, data())
    assert difference(alone, spread) <= ROUNDING


def test_a_checkpoint_of_a_run_in_parts_goes_on_anywhere(plain: Any, hetero: Any, tmp_path: Path) -> None:
    whole = Classifier()
    plain(max_epochs=4).fit(whole, data())
    first = Classifier()
    trainer = hetero(max_epochs=2, **IN_PARTS)
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Classifier()
    plain(max_epochs=4).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert difference(whole, second) <= ROUNDING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, r"micro_batches=0 must be a whole number from 1 on"),
        ({"micro_batches": 2.5}, r"micro_batches=2.5 must be a whole number from 1 on"),
        ({"micro_batches": True}, r"micro_batches=True must be a whole number from 1 on"),
        ({"hang_timeout_s": 0}, r"hang_timeout_s=0 must be a number of seconds above 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(hetero: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hetero(strategy=options)


def test_a_variable_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, hetero: Any) -> None:
    monkeypatch.setenv("HETERO_MICRO_BATCHES", "many")
    with pytest.raises(UsageError, match="HETERO_MICRO_BATCHES='many' must be a whole number from 1 on"):
        hetero()
