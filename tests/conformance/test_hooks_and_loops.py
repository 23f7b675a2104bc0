"""Loops, hooks and data of Lightning, over devices: the same calls in the same order, and the same numbers."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero import HeteroStrategy
from lightning_hetero.testing.lightning_module import Classifier, data, difference


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    """What Trainer(deterministic=True) sets stays set."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def fit_and_validate(trainer: pl.Trainer, model: Any) -> None:
    trainer.fit(model, data(), data())


def hooks_of(cls: type) -> set[str]:
    """Names of the public methods of a class."""
    return {name for name, _ in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


def note_calls(target: Any, names: set[str], events: list[Any], prefix: str = "") -> None:
    """Put a method on this very object, for each name, that notes its calls, as Lightning's own tests do."""

    def noted(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            events.append((prefix + name, len(args), sorted(kwargs), args if name == "train" else None, *modes))
            return result

        return functools.update_wrapper(call, method)

    for name in names:
        setattr(target, name, noted(name, getattr(target, name)))


class Noted(Classifier):
    """Notes every call of what Lightning may call."""

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.events: list[Any] = []
        of_torch = hooks_of(nn.Module) - {"forward", "zero_grad", "train"}
        note_calls(self, hooks_of(pl.LightningModule) - of_torch - {"optimizers", "log", "log_dict"}, self.events)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@pytest.mark.feature("loops: every hook of modules and callbacks, in order and as often as ever")
@pytest.mark.parametrize("automatic", [True, False])
def test_hooks_are_called_as_ever(automatic: bool, both: Any) -> None:
    def run(trainer: pl.Trainer, model: Noted) -> None:
        callback = Callback()
        note_calls(callback, hooks_of(Callback), model.events, "callback: ")
        trainer.callbacks.append(callback)  # type: ignore[attr-defined]
        trainer.fit(model, data(), data())
        trainer.validate(model, data(), verbose=False)
        trainer.test(model, data(), verbose=False)
        trainer.predict(model, data())

    runs = both(lambda: Noted(automatic), run=run)
    runs.check_parity()
    assert runs.spread.model.events == runs.alone.model.events
    assert len({event[0] for event in runs.spread.model.events}) > 60


OPTIONS = {
    "overfit_batches": {"overfit_batches": 2},
    "fast_dev_run": {"fast_dev_run": 3},
    "limit_*_batches": {"limit_train_batches": 3, "limit_val_batches": 0.5},
    "val_check_interval": {"val_check_interval": 2},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2},
    "num_sanity_val_steps": {"num_sanity_val_steps": -1},
    "max_steps": {"max_steps": 7, "max_epochs": -1},
    "inference_mode=False": {"inference_mode": False},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
    "detect_anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
    "use_distributed_sampler": {"use_distributed_sampler": True},
    "accumulate_grad_batches": {"accumulate_grad_batches": 3},
    "log_every_n_steps": {"log_every_n_steps": 1},
}


@pytest.mark.feature(
    "loops: options of the Trainer",
    note="overfit_batches, fast_dev_run, limit_*, val_check_interval, max_steps, inference_mode, detect_anomaly, "
    "deterministic, reload_dataloaders, sanity check and others.",
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_trainer(options: dict[str, Any], both: Any) -> None:
    runs = both(Classifier, run=fit_and_validate, **options)
    runs.check_parity()
    assert runs.spread.model.losses == pytest.approx(runs.alone.model.losses, abs=1e-12)
    assert runs.spread.trainer.global_step == runs.alone.trainer.global_step


@pytest.mark.feature("loops: barebones")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_barebones(both: Any, quiet: dict[str, Any]) -> None:
    bare = {name: None for name in quiet if name != "default_root_dir"}  # it refuses to be told
    runs = both(Classifier, barebones=True, **bare)
    assert runs.difference <= 1e-12


@pytest.mark.feature("loops: fit, validate, test and predict, one after the other, and fit again")
def test_all_loops(both: Any) -> None:
    def run(trainer: pl.Trainer, model: Any) -> Any:
        trainer.fit(model, data(), data())
        results = [trainer.validate(model, data(), verbose=False), trainer.test(model, data(), verbose=False)]
        predicted = torch.cat(trainer.predict(model, data()))
        assert predicted.device.type == "cpu"
        trainer.fit_loop.max_epochs = 3
        trainer.fit(model, data())
        return [*(value for result in results for value in result[0].values()), *predicted.flatten().tolist()]

    runs = both(Classifier, run=run)
    runs.check_parity()
    assert runs.spread.result == pytest.approx(runs.alone.result, abs=1e-12)
    assert len(runs.spread.model.losses) == 15


@pytest.mark.feature("loops: trainer.should_stop")
def test_a_user_stops_it(both: Any) -> None:
    class Stops(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = self.global_step == 3

    runs = both(Stops)
    runs.check_parity()
    assert runs.spread.trainer.global_step == runs.alone.trainer.global_step == 3


@pytest.mark.feature("loops: KeyboardInterrupt")
def test_an_interrupt(hostile: Any) -> None:
    class Interrupts(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise KeyboardInterrupt

    model, trainer = Interrupts(), hostile()
    with pytest.raises(SystemExit):
        trainer.fit(model, data())
    assert trainer.interrupted
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any(module._forward_pre_hooks for module in model.modules())


class Numbers(IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data().dataset)  # type: ignore[call-overload]


@pytest.mark.feature("data: IterableDataset without a length")
@pytest.mark.filterwarnings("ignore:Total length of")
def test_rows_without_a_length(both: Any) -> None:
    both(Classifier, run=lambda t, m: t.fit(m, DataLoader(Numbers(), batch_size=8))).check_parity()


def combined(mode: str) -> CombinedLoader:
    return CombinedLoader({"a": data(), "b": data(rows=24, batch_size=6)}, mode)  # type: ignore[arg-type]


@pytest.mark.feature("data: CombinedLoader in every mode")
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_combined_loaders(mode: str, both: Any) -> None:
    class Combined(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = [F.cross_entropy(self(part[0]), part[1]) for part in batch.values() if part is not None]
            return torch.stack(losses).sum()

    both(Combined, run=lambda trainer, model: trainer.fit(model, combined(mode))).check_parity()


@pytest.mark.feature("data: CombinedLoader in every mode")
def test_one_loader_after_the_other(both: Any) -> None:
    class Combined(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    # Lightning itself has this mode in evaluation only.
    both(Combined, run=lambda trainer, model: trainer.validate(model, combined("sequential"))).check_parity()


@pytest.mark.feature("data: several validation loaders")
def test_several_loaders(both: Any) -> None:
    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    runs = both(Several, run=lambda t, m: t.fit(m, data(), [data(), data(rows=12, batch_size=5)]))
    runs.check_parity()
    assert {"val/dataloader_idx_0", "val/dataloader_idx_1"} <= set(runs.spread.trainer.callback_metrics)


@pytest.mark.feature("data: LightningDataModule")
def test_data_modules(both: Any) -> None:
    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def prepare_data(self) -> None:
            self.calls.append("prepare")

        def setup(self, stage: str) -> None:
            self.calls.append(f"setup {stage}")

        def teardown(self, stage: str) -> None:
            self.calls.append(f"teardown {stage}")

        def train_dataloader(self) -> Any:
            return data()

        def val_dataloader(self) -> Any:
            return data()

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            self.calls.append("transfer")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def run(trainer: pl.Trainer, model: Any) -> list[str]:
        module = Data()
        trainer.fit(model, datamodule=module)
        return module.calls

    runs = both(Classifier, run=run)
    runs.check_parity()
    assert runs.spread.result == runs.alone.result


@pytest.mark.feature("data: on_before_batch_transfer, transfer_batch_to_device and on_after_batch_transfer")
def test_transfer_hooks(both: Any) -> None:
    class Own:
        """A batch that Lightning cannot move."""

        def __init__(self, batch: list[Tensor]) -> None:
            self.x, self.y = batch

    class Transfers(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return Own(batch)

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            assert device == self.device
            batch.x, batch.y = batch.x.to(device), batch.y.to(device)
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch.x * 2, batch.y]

    both(Transfers).check_parity()


@pytest.mark.feature("modules: inputs that stay on the CPU", note="They move where a layer takes them.")
def test_batches_that_are_left_on_the_cpu(both: Any) -> None:
    class Stays(Classifier):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch

    both(Stays).check_parity()


class Nested(pl.LightningModule):
    """A LightningModule in a LightningModule, which logs for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Classifier()
        self.outer = nn.Linear(4, 4).double()
        self.seen: set[Any] = set()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen |= {self.inner.device == self.device, self.inner.trainer is self.trainer}
        loss = F.cross_entropy(self.outer(self.inner(batch[0])), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.feature("modules: nested LightningModules")
def test_nested_modules(both: Any) -> None:
    runs = both(Nested)
    runs.check_parity()
    assert runs.spread.model.seen == {True}


class Saved(Classifier):
    """With hyperparameters."""

    def __init__(self, name: str = "mlp", lr: float = 1e-2) -> None:
        super().__init__(name)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


@pytest.mark.feature("modules: load_from_checkpoint and hyperparameters")
def test_load_from_checkpoint(both: Any, tmp_path: Path) -> None:
    def run(trainer: pl.Trainer, model: Any) -> Any:
        trainer.fit(model, data())
        path = tmp_path / f"{type(trainer.strategy).__name__}.ckpt"
        trainer.save_checkpoint(path)
        return Saved.load_from_checkpoint(path)

    runs = both(lambda: Saved(lr=0.02), run=run)
    runs.check_parity()
    loaded = runs.spread.result
    assert loaded.hparams == {"name": "mlp", "lr": 0.02}
    assert difference(loaded, runs.spread.model) == 0.0


@pytest.mark.feature("modules: trainer.init_module and configure_model")
@pytest.mark.parametrize("empty_init", [None, False, True])
def test_init_module(empty_init: bool | None, both: Any) -> None:
    def run(trainer: pl.Trainer, model: Any) -> Any:
        with trainer.init_module(empty_init=empty_init):
            late = Classifier()
            where = {p.device.type for p in late.parameters()}
        if empty_init:
            late.load_state_dict(Classifier().state_dict())
        trainer.fit(late, data())
        return where, late

    runs = both(nn.Module, run=run)
    assert difference(runs.spread.result[1], runs.alone.result[1]) <= 1e-12
    assert runs.spread.result[0] == {"cpu"}


@pytest.mark.feature("modules: deepcopy of the module and of the Trainer's strategy, in the middle of a run")
def test_copies_in_the_middle_of_a_run(both: Any) -> None:
    class Copies(Classifier):
        def on_train_epoch_end(self) -> None:
            twin = copy.deepcopy(self.net).cpu()
            again = pickle.loads(pickle.dumps(self.net)).cpu()
            with torch.no_grad():
                x = next(iter(data()))[0]
                self.copied = twin(x)
                assert torch.equal(self.copied, again(x))

    runs = both(Copies)
    runs.check_parity()
    assert (runs.spread.model.copied - runs.alone.model.copied).abs().max() <= 1e-12


@pytest.mark.feature("modules: deepcopy and pickle of HeteroStrategy")
def test_copies_of_the_strategy(hostile: Any, quiet: dict[str, Any]) -> None:
    trainer = hostile()
    trainer.fit(Classifier(), data())
    for twin in (copy.deepcopy(trainer.strategy), pickle.loads(pickle.dumps(trainer.strategy))):
        assert isinstance(twin, HeteroStrategy)
        model = Classifier()
        pl.Trainer(**quiet, strategy=twin, max_epochs=2).fit(model, data())
        assert len(model.losses) == 10
        assert twin.plan.device_of == trainer.strategy.plan.device_of


@pytest.mark.feature("modules: frozen layers, and layers that are not used")
def test_frozen_and_unused_layers(both: Any) -> None:
    class Partly(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.second.requires_grad_(False)
            self.unused = nn.Linear(3, 3).double()

    both(Partly).check_parity()


@pytest.mark.feature("modules: toggling train and eval of parts, and torch.no_grad in steps")
def test_modes_of_parts(both: Any) -> None:
    class Modes(Classifier):
        def __init__(self) -> None:
            super().__init__("convnet")

        def on_train_epoch_start(self) -> None:
            self.net.features.eval()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self(batch[0]).softmax(1)
            return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), target)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    both(Modes, run=lambda trainer, model: trainer.fit(model, data("convnet"), data("convnet"))).check_parity()


@pytest.mark.feature("loops: self.log of everything, reduced in every way")
def test_logging(both: Any) -> None:
    class Logs(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            for reduce in ("mean", "max", "min", "sum"):
                self.log(reduce, loss, on_step=True, on_epoch=True, reduce_fx=reduce, prog_bar=True)
            self.log("python", 1.5 * batch_idx)
            self.log("weights", self.net.second.weight.norm())  # from wherever that is
            self.log("synced", loss, sync_dist=True)
            self.log_dict({"a": loss, "b": self.net.third.bias.sum()}, batch_size=len(batch[0]))
            return loss

    both(Logs, run=fit_and_validate).check_parity()


@pytest.mark.feature("loops: outputs of steps reach the hooks")
def test_outputs_of_steps(both: Any) -> None:
    class Outputs(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.sums: list[float] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            scores = self(batch[0])
            return {"loss": F.cross_entropy(scores, batch[1]), "scores": scores.detach(), "text": "kept"}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert outputs["scores"].device == self.device
            assert outputs["text"] == "kept"
            self.sums.append(float(outputs["scores"].sum() + outputs["loss"]))

    runs = both(Outputs)
    runs.check_parity()
    assert runs.spread.model.sums == pytest.approx(runs.alone.model.sums, abs=1e-12)


class Seen(Callback):
    """Reads what callbacks may read of a run."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(
            (trainer.current_epoch, trainer.global_step, trainer.is_last_batch, trainer.num_training_batches)
        )
        assert trainer.model is module
        assert trainer.strategy.lightning_module is module
        assert trainer.estimated_stepping_batches == 10


@pytest.mark.feature("loops: what callbacks read of the Trainer")
def test_what_callbacks_read(both: Any) -> None:
    seen: list[Seen] = []

    def callbacks() -> list[Callback]:
        seen.append(Seen())
        return [seen[-1]]

    both(Classifier, callbacks=callbacks).check_parity()
    assert seen[0].seen == seen[1].seen


@pytest.mark.feature("loops: resuming with ckpt_path, and ckpt_path='best' and 'last'")
def test_resuming(both: Any, tmp_path: Path) -> None:
    def run(trainer: pl.Trainer, model: Any) -> Any:
        trainer.fit(model, data(), data())
        best = trainer.test(model, data(), ckpt_path="best", verbose=False)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(model, data(), data(), ckpt_path="last")
        return [*best[0].values()]

    def callbacks() -> list[Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return [ModelCheckpoint(folder, monitor="val_loss", save_last=True)]

    runs = both(Saved, run=run, callbacks=callbacks, enable_checkpointing=True)
    runs.check_parity()
    assert runs.spread.result == pytest.approx(runs.alone.result, abs=1e-12)
    assert len(runs.spread.model.losses) == 20
