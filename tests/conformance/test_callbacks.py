"""Lightning's callbacks do over several devices what they do over one."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_hetero.testing.lightning_module import Classifier, data


class Rated(Classifier):
    """Has a learning rate and a batch size that finders may set."""

    def __init__(self, name: str = "mlp", lr: float = 1e-2) -> None:
        super().__init__(name)
        self.lr = lr
        self.batch_size = 2
        self.size = name

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        return data(self.size, rows=40, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return data(self.size)


def fit_own(trainer: pl.Trainer, model: Any) -> Any:
    return trainer.fit(model)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def convnet() -> Classifier:
    return Classifier("convnet", sgd)


def fit_images(trainer: pl.Trainer, model: Any) -> None:
    trainer.fit(model, data("convnet"), data("convnet"))


@pytest.mark.feature("callbacks: every one of Lightning's has a row here")
def test_none_is_forgotten() -> None:
    """Those that a later Lightning brings make this fail, until somebody has tried them."""
    elsewhere = {"Callback", "Checkpoint", "ModelSummary", "RichModelSummary", "ProgressBar"}
    assert {name for name in lightning_callbacks.__all__ if name not in globals()} == elsewhere


# Weights


@pytest.mark.feature("callbacks: StochasticWeightAveraging")
@pytest.mark.parametrize("device", ["cpu", None])
def test_stochastic_weight_averaging_with_batch_norm(device: str | None, both: Any) -> None:
    both(
        convnet,
        run=fit_images,
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, device=device)],
        max_epochs=5,
    ).check_parity()


class EveryOtherEpoch(WeightAveraging):
    """Averages after epochs 1 and 3."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx in (1, 3)


@pytest.mark.feature("callbacks: WeightAveraging, EMAWeightAveraging")
@pytest.mark.parametrize(
    "make",
    [
        lambda: EMAWeightAveraging(decay=0.9, use_buffers=True),
        lambda: EMAWeightAveraging(decay=0.9, use_buffers=True, device=None, update_every_n_steps=2),
        lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False),
        lambda: EveryOtherEpoch(device=None),
    ],
    ids=["ema", "ema-on-root", "multi", "epochs"],
)
def test_weight_averaging(make: Any, both: Any) -> None:
    """Validation sees the averages, and training goes on with the weights."""
    both(convnet, run=fit_images, callbacks=lambda: [make()], max_epochs=4, accumulate_grad_batches=2).check_parity()


@pytest.mark.feature("callbacks: WeightAveraging, EMAWeightAveraging")
def test_averages_go_into_checkpoints_and_come_back(both: Any, tmp_path: Path) -> None:
    def run(trainer: pl.Trainer, model: Classifier) -> Any:
        fit_images(trainer, model)
        path = tmp_path / f"{type(trainer.strategy).__name__}.ckpt"
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        assert {tensor.device.type for tensor in saved["current_model_state"].values()} == {"cpu"}
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, data("convnet"), data("convnet"), ckpt_path=path)
        return saved["state_dict"]["net.head.1.weight"]

    sides = both(convnet, run=run, callbacks=lambda: [EMAWeightAveraging(decay=0.9)])
    sides.check_parity()
    torch.testing.assert_close(sides.spread.result, sides.alone.result, rtol=0, atol=1e-12)


class Tuned(Classifier):
    def __init__(self) -> None:
        super().__init__("convnet")
        self.backbone = self.net.features

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.head.parameters(), lr=1e-2)


@pytest.mark.feature("callbacks: BackboneFinetuning, BaseFinetuning")
def test_backbone_finetuning(both: Any) -> None:
    both(
        Tuned,
        run=fit_images,
        callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.0)],
        max_epochs=4,
    ).check_parity()


class Thaws(BaseFinetuning):
    """Freezes all but the head, and thaws one layer at each epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.net.first, pl_module.net.second])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch in (1, 2):
            layer = {1: pl_module.net.second, 2: pl_module.net.first}[epoch]
            self.unfreeze_and_add_param_group(layer, optimizer, lr=1e-2)


class Head(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


@pytest.mark.feature("callbacks: BackboneFinetuning, BaseFinetuning")
def test_layers_that_thaw_one_by_one_and_a_resumed_run(both: Any, tmp_path: Path) -> None:
    def run(trainer: pl.Trainer, model: Any) -> None:
        trainer.fit(model, data())
        path = tmp_path / f"{type(trainer.strategy).__name__}.ckpt"
        trainer.save_checkpoint(path)
        trainer.fit_loop.max_epochs = 5
        trainer.fit(model, data(), ckpt_path=path)

    both(Head, run=run, callbacks=lambda: [Thaws()], max_epochs=3).check_parity()


# Pruning


@pytest.mark.feature("callbacks: ModelPruning, layer by layer")
@pytest.mark.parametrize(
    "how",
    [
        {"pruning_fn": "l1_unstructured"},
        {"pruning_fn": "l1_unstructured", "make_pruning_permanent": False},
        {"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 1, "parameter_names": ["weight"]},
    ],
    ids=["unstructured", "masks-stay", "structured"],
)
def test_pruning_layer_by_layer(how: dict[str, Any], both: Any) -> None:
    # Without the lottery ticket: on the CPU, Lightning's reset hands out its copy of the first weights itself.
    sides = both(
        Classifier,
        callbacks=lambda: [
            ModelPruning(use_global_unstructured=False, amount=0.3, use_lottery_ticket_hypothesis=False, **how)
        ],
    )
    sides.check_parity()
    assert (sides.spread.model.net.first.weight == 0).any()
    assert {tensor.device.type for tensor in sides.spread.model.state_dict().values()} == {"cpu"}


@pytest.mark.feature("callbacks: ModelPruning, layer by layer")
def test_after_pruning_teardown_gathers_everything_and_hides_nothing(hostile: Any, caplog: Any) -> None:
    """Masked weights are no parameters any more, and what pruning holds torch does not let anybody swap."""

    class Fails(Classifier):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                raise KeyError("the user's own")

    model = Fails()
    pruning = ModelPruning("random_unstructured", use_global_unstructured=False, amount=0.5)
    with pytest.raises(KeyError, match="the user's own"):
        hostile(callbacks=[pruning], max_epochs=3).fit(model, data())
    assert "could not be gathered" not in caplog.text
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(getattr(m, "weight", model.device) for m in model.net.children()),
    ]
    assert {str(getattr(tensor, "device", tensor)) for tensor in tensors} == {"cpu"}


@pytest.mark.feature("callbacks: ModelPruning over all layers at once")
@pytest.mark.parametrize("permanent", [True, False])
@pytest.mark.parametrize("pruning_fn", ["l1_unstructured", "random_unstructured"])
def test_pruning_of_all_layers_at_once(pruning_fn: str, permanent: bool, both: Any) -> None:
    sides = both(
        Classifier,
        callbacks=lambda: [
            ModelPruning(
                pruning_fn, amount=0.3, use_lottery_ticket_hypothesis=False, make_pruning_permanent=permanent, verbose=1
            )
        ],
    )
    sides.check_parity()
    layers = [module for module in sides.spread.model.modules() if isinstance(module, torch.nn.Linear)]
    shares = [(layer.weight == 0).double().mean().item() for layer in layers]
    assert max(shares) > 0.1
    assert len(set(shares)) > 1
    assert "apply_pruning" not in vars(sides.spread.trainer.callbacks[0])
    assert {tensor.device.type for tensor in sides.spread.model.state_dict().values()} == {"cpu"}


# When to stop and what to keep


@pytest.mark.feature("callbacks: EarlyStopping")
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_early_stopping(at_epoch_end: bool, both: Any) -> None:
    stops = {"check_on_train_epoch_end": at_epoch_end, "patience": 0, "min_delta": 0.2}
    sides = both(
        lambda: Classifier("mlp", sgd),
        run=lambda trainer, model: trainer.fit(model, data(), data()),
        callbacks=lambda: [EarlyStopping("loss" if at_epoch_end else "val_loss", **stops)],
        max_epochs=20,
    )
    sides.check_parity()
    assert sides.spread.trainer.current_epoch == sides.alone.trainer.current_epoch < 20


@pytest.mark.feature("callbacks: EarlyStopping")
def test_early_stopping_on_values_that_are_not_finite(both: Any) -> None:
    class Explodes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("bad", loss.detach() if self.global_step < 3 else loss.detach() * float("inf"))
            return loss

    sides = both(Explodes, callbacks=lambda: [EarlyStopping("bad", check_finite=True)], max_epochs=5)
    assert sides.spread.trainer.global_step == sides.alone.trainer.global_step == 5


def files_of(callback: ModelCheckpoint) -> list[str]:
    return sorted(path.name for path in Path(callback.dirpath).iterdir())


@pytest.mark.feature("callbacks: ModelCheckpoint")
@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "val_loss", "save_top_k": 2, "save_last": True, "filename": "{epoch}-{val_loss:.6f}"},
        {"monitor": "val_loss", "mode": "max", "save_top_k": 1, "save_last": "link", "save_weights_only": True},
        {"every_n_train_steps": 3, "save_top_k": -1},
        {"every_n_epochs": 2, "save_top_k": -1, "save_on_train_epoch_end": True},
    ],
    ids=["top-k", "link", "steps", "epochs"],
)
def test_model_checkpoint_keeps_the_same_files(options: dict[str, Any], both: Any, tmp_path: Path) -> None:
    folders = iter([tmp_path / "alone", tmp_path / "spread"])

    sides = both(
        Classifier,
        run=lambda trainer, model: trainer.fit(model, data(), data()),
        callbacks=lambda: [ModelCheckpoint(next(folders), **options)],
        max_epochs=4,
        enable_checkpointing=True,
    )
    sides.check_parity()
    alone, spread = sides.alone.trainer.checkpoint_callback, sides.spread.trainer.checkpoint_callback
    names = [name for name in files_of(spread) if not name.endswith(".sha256")]
    assert names == files_of(alone)
    assert Path(spread.best_model_path).name == Path(alone.best_model_path).name
    for name in names:
        mine = torch.load(Path(spread.dirpath, name), weights_only=True)["state_dict"]
        theirs = torch.load(Path(alone.dirpath, name), weights_only=True)["state_dict"]
        assert list(mine) == list(theirs)
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*called without a model", "ignore:.*no last checkpoint available")  # Lightning's
@pytest.mark.feature("callbacks: OnExceptionCheckpoint")
def test_a_checkpoint_of_the_moment_before_an_exception(both: Any, tmp_path: Path) -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 7:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    def run(trainer: pl.Trainer, model: Any) -> None:
        with pytest.raises(KeyError, match="the user's own"):
            trainer.fit(model, data())

    folders = [tmp_path / "alone", tmp_path / "spread"]
    given = iter(folders)
    both(Fails, run=run, callbacks=lambda: [OnExceptionCheckpoint(next(given))], enable_checkpointing=True)
    theirs, mine = (torch.load(folder / "on_exception.ckpt", weights_only=True) for folder in folders)
    assert mine["global_step"] == theirs["global_step"] == 7
    for key, tensor in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][key], tensor, rtol=0, atol=1e-12)


@pytest.mark.feature("callbacks: Timer")
def test_the_timer_stops_a_run(hostile: Any) -> None:
    timer = Timer(timedelta(seconds=0.1))
    trainer = hostile(callbacks=[timer], max_epochs=-1)
    trainer.fit(Classifier(), data())  # would go on for ever
    assert timer.time_elapsed("train") >= 0.1


@pytest.mark.feature("callbacks: SpikeDetection")
def test_a_spike_of_the_loss_is_found_at_the_same_batch(both: Any, tmp_path: Path) -> None:
    class Spikes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 3 else loss

    def run(trainer: pl.Trainer, model: Any) -> Any:
        with pytest.raises(TrainingSpikeException):
            trainer.fit(model, data())
        return json.loads(Path(trainer.callbacks[0].exclude_batches_path).read_text())

    paths = iter([tmp_path / "alone.json", tmp_path / "spread.json"])
    sides = both(
        Spikes, run=run, callbacks=lambda: [SpikeDetection(warmup=1, window=2, exclude_batches_path=next(paths))]
    )
    assert sides.spread.result == sides.alone.result != []


# Along the way


@pytest.mark.feature("callbacks: LambdaCallback")
def test_hooks_are_called_in_the_same_order(both: Any) -> None:
    calls: list[list[str]] = []

    def make() -> list[Any]:
        calls.append([])
        seen = calls[-1]
        hooks = [name for name in dir(pl.Callback) if name.startswith(("on_", "setup", "teardown"))]
        plain = [name for name in hooks if name not in ("on_exception", "on_save_checkpoint", "on_load_checkpoint")]
        return [LambdaCallback(**{name: lambda *_, name=name, **__: seen.append(name) for name in plain})]

    def run(trainer: pl.Trainer, model: Any) -> None:
        trainer.fit(model, data(), data())
        trainer.validate(model, data(), verbose=False)
        trainer.test(model, data(), verbose=False)
        trainer.predict(model, data())

    both(Classifier, run=run, callbacks=make).check_parity()
    assert len(calls[0]) > 100
    assert calls[1] == calls[0]


@pytest.mark.feature("callbacks: GradientAccumulationScheduler")
def test_accumulation_that_changes_with_the_epoch(both: Any) -> None:
    sides = both(Classifier, callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 5, 2: 1})], max_epochs=3)
    sides.check_parity()
    assert sides.spread.trainer.global_step == sides.alone.trainer.global_step == 3 + 1 + 5


@pytest.mark.feature("callbacks: LearningRateMonitor")
def test_learning_rates_and_momenta_are_logged(both: Any, tmp_path: Path) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    sides = both(
        Scheduled,
        callbacks=lambda: [LearningRateMonitor(log_momentum=True, log_weight_decay=True)],
        max_epochs=3,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    assert sides.spread.trainer.callbacks[0].lrs == sides.alone.trainer.callbacks[0].lrs
    assert len(sides.alone.trainer.callbacks[0].lrs["lr-SGD"]) >= 3


@pytest.mark.feature("callbacks: ThroughputMonitor")
def test_throughput_is_counted(both: Any, tmp_path: Path) -> None:
    class Counted(Classifier):
        flops_per_batch = 1000

    sides = both(
        Counted,
        callbacks=lambda: [ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=3)],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    spread, alone = sides.spread.trainer.callback_metrics, sides.alone.trainer.callback_metrics
    assert spread.keys() == alone.keys()
    monitors = [side.trainer.callbacks[0] for side in (sides.alone, sides.spread)]
    assert monitors[0]._samples == monitors[1]._samples
    assert monitors[0]._batches == monitors[1]._batches


@pytest.mark.feature("callbacks: BasePredictionWriter")
@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_predictions_are_handed_to_writers_on_the_root(interval: str, both: Any) -> None:
    class Keeps(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__(interval)
            self.seen: list[Any] = []

        def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, *_) -> None:  # type: ignore[no-untyped-def]
            assert prediction.device == trainer.strategy.root_device
            self.seen.append((prediction, batch_indices))

        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices) -> None:  # type: ignore[no-untyped-def]
            self.seen.extend(zip(predictions, batch_indices[0], strict=True))

    sides = both(Classifier, run=lambda trainer, model: trainer.predict(model, data()), callbacks=lambda: [Keeps()])
    mine, theirs = (side.trainer.callbacks[0].seen for side in (sides.spread, sides.alone))
    assert [rows for _, rows in mine] == [rows for _, rows in theirs]
    for (one, _), (other, _) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.feature("callbacks: TQDMProgressBar, RichProgressBar")
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars(bar: Any, both: Any, capfd: Any) -> None:
    class Shows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("shown", loss, prog_bar=True)
            return loss

    sides = both(
        Shows,
        run=lambda trainer, model: trainer.fit(model, data(), data()),
        callbacks=lambda: [bar(refresh_rate=1)],
        enable_progress_bar=True,
    )
    sides.check_parity()
    assert capfd.readouterr().out.count("shown") >= 2
    mine, theirs = (side.trainer.progress_bar_metrics for side in (sides.spread, sides.alone))
    assert mine == pytest.approx(theirs, rel=0, abs=1e-12)


@pytest.mark.feature("callbacks: LearningRateFinder, BatchSizeFinder")
def test_the_learning_rate_finder(both: Any) -> None:
    sides = both(Rated, run=fit_own, callbacks=lambda: [LearningRateFinder(max_lr=0.05, num_training_steps=15)])
    print(
        "LRS",
        sides.spread.model.lr,
        sides.alone.model.lr,
        sides.alone.model.losses[15:],
        sides.spread.model.losses[15:],
    )
    sides.check_parity()
    assert sides.spread.model.lr == pytest.approx(sides.alone.model.lr, rel=1e-12)
    assert sides.alone.model.lr != 1e-2


@pytest.mark.feature("callbacks: LearningRateFinder, BatchSizeFinder")
@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_finder(mode: str, both: Any) -> None:
    sides = both(
        Rated, run=fit_own, callbacks=lambda: [BatchSizeFinder(mode, steps_per_trial=1, max_trials=4)], max_epochs=1
    )
    sides.check_parity()
    assert sides.spread.model.batch_size == sides.alone.model.batch_size > 2


# What the devices do


def columns(folder: Path) -> list[str]:
    (path,) = folder.rglob("metrics.csv")
    return path.read_text().splitlines()[0].split(",")


@pytest.mark.feature("callbacks: DeviceStatsMonitor", note="Names begin with the device; those of the root stay too.")
@pytest.mark.parametrize("devices", ["accelerator"], indirect=True)
def test_the_device_monitor_sees_all_devices(hostile: Any, devices: Any, tmp_path: Path) -> None:
    trainer = hostile(callbacks=[DeviceStatsMonitor()], logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    trainer.fit(Classifier(), data())
    seen = columns(tmp_path)
    moment = "DeviceStatsMonitor.on_train_batch_end/"
    assert f"{moment}cpu_percent" in seen
    for device in devices.names:
        assert any(name.startswith(f"{moment}{device}/") for name in seen)


@pytest.mark.feature("callbacks: DeviceStatsMonitor", note="Names begin with the device; those of the root stay too.")
@pytest.mark.parametrize("devices", ["accelerator"], indirect=True)
@pytest.mark.parametrize("cpu_stats", [None, False])
def test_the_device_monitor_without_the_cpu(cpu_stats: Any, hostile: Any, devices: Any, tmp_path: Path) -> None:
    other = devices.names[1]
    trainer = hostile(
        strategy={"devices": [other, "cpu"]},
        callbacks=[DeviceStatsMonitor(cpu_stats)],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        max_epochs=1,
    )
    trainer.fit(Classifier(), data())
    seen = columns(tmp_path)
    assert f"DeviceStatsMonitor.on_train_batch_end/{other}/allocated_bytes.all.current" in seen
    assert any("cpu_percent" in name for name in seen) == (cpu_stats is None)
    assert "get_device_stats" not in vars(trainer.accelerator)
