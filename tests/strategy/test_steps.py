"""Whole training steps in micro-batches: gradient accumulation over the same micro-batches, bit for bit."""

from __future__ import annotations

import gc
import threading
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_hetero.errors import ScheduleError, UnsupportedError, UsageError
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference
from lightning_hetero.testing.models import MODELS

STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}}
PARTS = {"micro_batching": "step"}
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Quiet(Classifier):
    """Keeps no list of losses, so that nothing goes from one micro-batch to the next."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


class Threads(pl.Callback):
    """Sees whether lanes were at work."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def on_train_batch_end(self, *args: Any) -> None:
        self.names |= {thread.name for thread in threading.enumerate() if thread.name.startswith("hetero")}


def was_cut(trainer: Any) -> bool:
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, Threads)]
    return bool(callback.names)


@pytest.mark.parametrize("name", ["mlp", "convnet", "tied_transformer", "recurrent", "attention", "borrower"])
def test_equal_to_plain_accumulation_bit_for_bit(name: str, plain: Any, hetero: Any) -> None:
    """Batch statistics included: buffers change once for each micro-batch, in order."""
    alone, spread = Quiet(name), Quiet(name)
    plain(accumulate_grad_batches=4).fit(alone, data(name, batch_size=2))
    trainer = hetero(devices=EMULATED, **STEPS, callbacks=[Threads()])
    trainer.fit(spread, data(name, batch_size=8))
    assert was_cut(trainer)
    bound = 1e-9 if name in ("tied_transformer", "borrower") else 0.0  # several gradients for one weight
    assert difference(alone, spread) <= bound


class Again(Quiet):
    """Calls the same two layers four times, so that each of them gets four gradients from one micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.net = (nn.Linear(8, size).double() for size in (8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.tanh(self.second(torch.relu(self.first(x)))) + x
        return self.net(x)  # type: ignore[no-any-return]


def test_layers_that_are_called_again_and_again_are_equal_bit_for_bit(plain: Any, hetero: Any) -> None:
    """Gradients of one weight are added up from the last call to the first, as by autograd, and then over batches."""
    alone, spread = Again(), Again()
    spread.load_state_dict(alone.state_dict())
    plain(accumulate_grad_batches=4).fit(alone, data(batch_size=2))
    trainer = hetero(devices=EMULATED, **STEPS, callbacks=[Threads()])
    trainer.fit(spread, data(batch_size=8))
    assert was_cut(trainer)
    assert difference(alone, spread) == 0.0


@pytest.mark.parametrize("rotation", range(3))
def test_on_accelerators(rotation: int, plain: Any, hetero: Any, accelerator: EmulatedAccelerator) -> None:
    places = ["cpu", *accelerator.devices[:2]]
    for name in MODELS:
        alone, spread = Quiet(name), Quiet(name)
        plain(accumulate_grad_batches=4).fit(alone, data(name, batch_size=2))
        hetero(devices=places[rotation:] + places[:rotation], **STEPS).fit(spread, data(name, batch_size=8))
        assert difference(alone, spread) <= 1e-9


def test_losses_are_weighted_by_rows_when_they_do_not_divide(plain: Any, hetero: Any) -> None:
    alone, spread = Quiet(), Quiet()
    plain().fit(alone, data(rows=26, batch_size=10))  # 10, 10, 6 rows: 3 3 2 2 and 2 2 1 1
    hetero(devices=EMULATED, **STEPS).fit(spread, data(rows=26, batch_size=10))
    assert difference(alone, spread) <= 1e-9


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_over_batches_on_top(accumulate: int, plain: Any, hetero: Any) -> None:
    alone, spread = Quiet(), Quiet()
    plain(accumulate_grad_batches=4 * accumulate).fit(alone, data(rows=48, batch_size=2))
    hetero(devices=EMULATED, accumulate_grad_batches=accumulate, **STEPS).fit(spread, data(rows=48, batch_size=8))
    assert difference(alone, spread) <= 1e-9  # a sum of sums


def test_clipping_and_schedulers(plain: Any, hetero: Any) -> None:
    class Scheduled(Quiet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.5, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    alone, spread = Scheduled(), Scheduled()
    plain(accumulate_grad_batches=4, gradient_clip_val=0.05).fit(alone, data(batch_size=2))
    hetero(devices=EMULATED, gradient_clip_val=0.05, **STEPS).fit(spread, data(batch_size=8))
    assert difference(alone, spread) == 0.0


def test_what_is_logged_is_that_of_the_whole_batch(plain: Any, hetero: Any) -> None:
    class Logs(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(4, average="micro")
            self.mean, self.losses = MeanMetric(), MeanMetric()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            x, y = batch
            scores = self(x)
            loss = F.cross_entropy(scores, y)
            self.losses(loss)
            self.log("losses", self.losses, on_step=False, on_epoch=True)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log_dict(
                {"rows": float(len(x)), "also": loss.detach() * 2}, reduce_fx="sum", on_step=True, on_epoch=True
            )
            self.log("largest", scores.max(), reduce_fx="max", on_step=True, on_epoch=True)
            self.log("mine", float(len(x)), batch_size=1, on_step=False, on_epoch=True)
            self.accuracy(scores, y)
            self.mean.update(x)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return {"loss": loss, "scores": scores.detach()}

    seen: list[list[Any]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.endswith("_step")}
            seen[-1].append({**logged, "scores": outputs["scores"].tolist(), "loss": float(outputs["loss"])})

    epochs = []
    for trainer in (
        plain(callbacks=[Watch()], max_epochs=1),
        hetero(devices=EMULATED, callbacks=[Watch()], max_epochs=1, **STEPS),
    ):
        seen.append([])
        trainer.fit(Logs(), data(rows=26, batch_size=10))
        epochs.append({key: float(value) for key, value in trainer.callback_metrics.items()})
    ours, theirs = epochs[1], epochs[0]
    assert ours.keys() == theirs.keys()
    for key in theirs.keys() - {"also", "also_step", "also_epoch", "mine"}:
        assert ours[key] == pytest.approx(theirs[key], abs=1e-6), key
    # A sum of means over micro-batches is what it is: four of them, each of its own rows.
    assert ours["also_step"] != pytest.approx(theirs["also_step"])
    for step, other in zip(*seen, strict=True):
        assert step["scores"] == [pytest.approx(row, abs=1e-9) for row in other["scores"]]
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-12)
        assert step["rows_step"] == other["rows_step"]


def test_attributes_that_a_step_sets_are_its_own_and_the_last_ones_stay(plain: Any, hetero: Any) -> None:
    class Keeps(Quiet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            self.last_x = x
            scores = self(x)
            assert self.last_x is x
            self.last_loss = F.cross_entropy(scores, y)
            return self.last_loss

    alone, spread = Keeps(), Keeps()
    plain(accumulate_grad_batches=4).fit(alone, data(batch_size=2))
    trainer = hetero(devices=EMULATED, callbacks=[Threads()], **STEPS)
    trainer.fit(spread, data(batch_size=8))
    assert was_cut(trainer)
    assert difference(alone, spread) == 0.0
    assert torch.equal(spread.last_x, alone.last_x)
    assert torch.equal(spread.last_loss, alone.last_loss)


@pytest.mark.parametrize("anew", [False, True])
def test_a_buffer_that_another_method_than_forward_changes_does_so_in_order(
    anew: bool, plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(4, dtype=torch.float64))
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, scores: Tensor) -> Tensor:
            return (scores - self.centre) * self.scale

        def update(self, scores: Tensor) -> None:
            moved = self.centre * 0.5 + scores.detach().mean(0) * 0.5
            if anew:
                self.centre = moved
            else:
                self.centre.copy_(moved)

    class Teacher(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.centred = Centre()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            scores = self(x)
            loss = F.cross_entropy(self.centred(scores), y)
            self.centred.update(scores)
            return loss

    alone, spread = Teacher(), Teacher()
    plain(accumulate_grad_batches=4).fit(alone, data(batch_size=2))
    hetero(devices=EMULATED, **STEPS).fit(spread, data(batch_size=8))
    assert difference(alone, spread) == 0.0
    assert torch.equal(alone.centred.centre, spread.centred.centre)
    assert "the buffer centred.centre is changed, and not by the forward of its module" in caplog.text


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("self.count = getattr(self, 'count', 0) + 1; loss = loss * self.count",
         "self.count goes from one batch to the next"),
        ("self.seen.append(len(x)); loss = loss * len(self.seen)", "the content of self.seen is changed"),
        ("self.mean.mul_(0.5).add_(loss.detach()); loss = loss * (1 + self.mean)",
         "the buffer 'mean' of Carries is changed"),
        ("(g,) = torch.autograd.grad(loss, self.net.first.weight, retain_graph=True); loss = loss + g.sum().detach()",
         "it computes gradients itself"),
    ],
)  # fmt: skip
def test_what_goes_from_one_micro_batch_to_the_next_goes_in_order(
    code: str, reason: str, plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Carries(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            names = {"self": self, "x": x, "torch": torch, "loss": F.cross_entropy(self(x), y)}
            exec(code, names)
            return names["loss"]  # type: ignore[return-value]

    alone, spread = Carries(), Carries()
    plain(accumulate_grad_batches=4).fit(alone, data(batch_size=2))
    hetero(devices=EMULATED, **STEPS).fit(spread, data(batch_size=8))
    assert difference(alone, spread) == 0.0
    assert f"run one after the other, because {reason}" in caplog.text


@pytest.mark.parametrize(
    "code",
    [
        "self.count = getattr(self, 'count', 0) + 1",
        "self.seen.append(len(x))",
        "self.last[0] = len(x)",
        "self.mean.add_(1)",
        "del self.flag; self.flag = 1",
    ],
)
def test_state_that_appears_later_is_refused_not_mixed_up(code: str, hetero: Any) -> None:
    class Later(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []
            self.last = [0]
            self.flag = 0
            self.register_buffer("mean", torch.zeros(()))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            if batch_idx > 1:
                if "flag" in code and self.flag > 5:
                    raise AssertionError
                exec(code, {"self": self, "x": x})
            return F.cross_entropy(self(x), y)

    with pytest.raises(
        UnsupportedError, match=r"self\.\w+ goes from one micro-batch to the next in training_step, which"
    ):
        hetero(devices=EMULATED, **STEPS).fit(Later(), data())


def test_dropout_is_repeatable(hetero: Any) -> None:
    class Drops(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(self.drop(x)), y) + torch.rand(()) * 0.1

    runs = []
    for _ in range(4):
        pl.seed_everything(5, verbose=False)
        model = Drops()
        hetero(devices=EMULATED, **STEPS).fit(model, data())
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_batches_of_texts_and_structures_are_cut_together(hetero: Any, plain: Any) -> None:
    class Texts(Quiet):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            assert len(batch["texts"]) == len(batch["x"]) == len(batch["pair"][1])
            assert all(text == f"{float(row[0]):.3f}" for text, row in zip(batch["texts"], batch["x"], strict=True))
            return F.cross_entropy(self(batch["x"]), batch["pair"][0])

    x, y = torch.randn(16, 8, dtype=torch.float64), torch.randint(4, (16,))
    rows = [{"x": a, "texts": f"{float(a[0]):.3f}", "pair": (b, "name")} for a, b in zip(x, y, strict=True)]
    alone, spread = Texts(), Texts()
    plain(accumulate_grad_batches=4).fit(alone, DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    hetero(devices=EMULATED, **STEPS).fit(spread, DataLoader(rows, batch_size=8))  # type: ignore[arg-type]
    assert difference(alone, spread) == 0.0


def test_manual_optimization_keeps_its_whole_batches(plain: Any, hetero: Any) -> None:
    class Manual(Quiet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    alone, spread = Manual(), Manual()
    plain().fit(alone, data())
    hetero(devices=EMULATED, **STEPS).fit(spread, data())
    assert difference(alone, spread) <= 1e-9


def test_an_error_in_one_micro_batch_reaches_the_user(hetero: Any) -> None:
    class Fails(Quiet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 3 and bool((batch[0].sum() == self.bad).all()):
                raise ValueError("this one")
            return super().training_step(batch, batch_idx)

    model = Fails()
    batches = list(data())
    model.bad = batches[3][0][4:6].sum()
    with pytest.raises(ValueError, match="this one") as caught:
        hetero(devices=EMULATED, **STEPS).fit(model, data())
    assert "micro-batch 2 of 4 in the training step" in caught.value.__notes__
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hetero")]


def test_a_reentrant_checkpoint_is_refused_with_what_to_write(hetero: Any) -> None:
    class Checkpoints(Quiet):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="use_reentrant=True") as caught:
        hetero(devices=EMULATED, **STEPS).fit(Checkpoints(), data())
    assert "Pass use_reentrant=False to torch.utils.checkpoint, which computes the same" in caught.value.__notes__[0]


def test_a_loss_for_some_micro_batches_only_is_refused(hetero: Any) -> None:
    class Some(Quiet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if float(batch[0][0, 0]) > 0 else super().training_step(batch, batch_idx)

    with pytest.raises(
        UnsupportedError, match=r"a loss for some micro-batches and None for others\. Set micro_batching"
    ):
        hetero(devices=EMULATED, **STEPS).fit(Some(), data(rows=80))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved_1f1b", "sequential"])
def test_every_schedule_gives_the_same_numbers(schedule: str, plain: Any, hetero: Any) -> None:
    alone, spread = Quiet("convnet"), Quiet("convnet")
    plain(accumulate_grad_batches=4).fit(alone, data("convnet", batch_size=2))
    options = {**STEPS["strategy"], "schedule": schedule}
    hetero(devices=EMULATED, strategy=options).fit(spread, data("convnet", batch_size=8))
    assert difference(alone, spread) == 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "1f1b"}, UsageError, r"schedule='1f1b' orders whole training steps; set micro_batching='step'"),
        ({"schedule": "zero_bubble", **PARTS}, UsageError, r"which only the simulator can do; take '1f1b' instead"),
        ({"schedule": "1f2b", **PARTS}, ScheduleError, r"unknown schedule '1f2b'. Did you mean '1f1b'"),
    ],
)
def test_schedules_that_cannot_be_followed_are_refused(
    hetero: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hetero(strategy=options)


def test_a_word_that_means_nothing_is_refused(hetero: Any) -> None:
    with pytest.raises(UsageError, match=r"micro_batching='stages' is not known; it may be 'forward' or 'step'"):
        hetero(strategy={"micro_batching": "stages"})


@pytest.mark.parametrize("strategy", [{"micro_batches": 4}, STEPS["strategy"]], ids=["forward", "step"])
def test_no_tensor_of_a_step_waits_for_the_garbage_collector(strategy: dict[str, Any], hetero: Any) -> None:
    """A whole batch more on a device, until Python happens to collect."""

    class Collects(pl.Callback):
        found: list[Any]

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                # Torch keeps what is left of a backward that failed, an earlier test's, until the next one begins; its
                # tensors hold one another through C++, of which a collection frees one layer at a time.
                while gc.collect():
                    pass
                gc.disable()
                gc.set_debug(gc.DEBUG_SAVEALL)
            elif batch_idx == 4:
                gc.collect()
                gc.set_debug(0)
                # By type: `isinstance` asks a weak proxy of a dead thing for its class.
                self.found = [type(thing).__name__ for thing in gc.garbage if issubclass(type(thing), Tensor)]

    collects = Collects()
    try:
        hetero(devices=EMULATED, strategy=strategy, callbacks=[collects], max_epochs=1).fit(Quiet(), data())
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert collects.found == []


def test_no_more_micro_batches_are_alive_than_devices_and_one(hetero: Any, accelerator: EmulatedAccelerator) -> None:
    """Peak memory beyond the weights: of 8 micro-batches at most 3 keep activations, for 2 devices."""

    class Wide(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(16)))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).pow(2).mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = 4096
    loader = DataLoader(TensorDataset(torch.randn(2 * rows, 16)), batch_size=rows)
    where = {f"net.{index}": accelerator.devices[index // 8] for index in range(16)}
    peaks = {}
    for mode in ("forward", "step"):
        accelerator.reset()
        trainer = hetero(
            devices=list(accelerator.devices[:2]),
            placement=where,
            strategy={"micro_batches": 8, "micro_batching": mode},
            max_epochs=1,
        )
        trainer.fit(Wide(), loader)
        peaks[mode] = accelerator.stats(0).peak_bytes
    batch = rows * 16 * 4  # bytes of the inputs, which are on the root all the time
    kept = 8 * batch  # output of each of the eight tanh of the first device, for the whole batch
    assert peaks["forward"] > batch + kept
    assert peaks["step"] < batch + kept * 5 / 8  # three of eight, and what one of them needs while it runs


@pytest.mark.parametrize(("rows", "parts"), [(2, None), (3, None), (4, 2), (5, 2), (8, 4)])
def test_batch_normalisation_gets_two_rows_at_least(
    rows: int, parts: int | None, plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    class Counts(Quiet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            seen.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    model = Counts("convnet")
    hetero(devices=EMULATED, **STEPS, max_steps=1).fit(model, data("convnet", batch_size=rows))
    assert len(seen) == (parts or 1)
    assert min(seen) >= 2
    assert ("because batch normalisation needs two rows of each" in caplog.text) == (parts is None)
