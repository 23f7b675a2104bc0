"""Everything of Lightning that writes, links, removes or reads checkpoints, with ours underneath."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from lightning_hetero.errors import CheckpointError
from lightning_hetero.strategy.checkpoint_files import is_sealed
from lightning_hetero.strategy.lightning_pytorch import HeteroCheckpointIO, HeteroStrategy
from lightning_hetero.testing.lightning_module import Classifier, data, difference

MakeTrainer = Callable[..., pl.Trainer]
Names = Callable[[Path], set[str]]


def all_sealed(folder: Path) -> bool:
    def sealed(path: Path) -> bool:
        with path.open("rb") as file:
            return is_sealed(file)

    return all(sealed(path) for path in folder.glob("*.ckpt"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.feature("checkpoints: save_top_k and save_last")
def test_only_the_best_are_kept(hetero: MakeTrainer, tmp_path: Path, names: Names) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="loss", save_top_k=2, save_last=True, filename="{epoch}")
    hetero(callbacks=[keeper], enable_checkpointing=True, max_epochs=4).fit(Classifier(), data())
    assert names(tmp_path / "kept") == {"epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"}
    assert all_sealed(tmp_path / "kept")


@pytest.mark.feature("checkpoints: save_last='link'")
def test_the_last_may_be_a_link(hetero: MakeTrainer, tmp_path: Path) -> None:
    def kept(save_last: Any) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "kept", save_top_k=-1, save_last=save_last, filename="{epoch}")

    model, last = Classifier(), tmp_path / "kept" / "last.ckpt"
    hetero(callbacks=[kept("link")], enable_checkpointing=True, max_epochs=2).fit(model, data())
    assert last.resolve() == tmp_path / "kept" / "epoch=1.ckpt"
    trainer = hetero(callbacks=[kept("link")], enable_checkpointing=True, max_epochs=3)
    trainer.fit(model, data(), ckpt_path=last)
    assert last.resolve() == tmp_path / "kept" / "epoch=2.ckpt"
    trainer.save_checkpoint(last)  # where the link was, and not in the file that it points to
    assert not last.is_symlink()
    assert all_sealed(tmp_path / "kept")


@pytest.mark.feature("checkpoints: save_weights_only")
def test_weights_alone_are_saved_without_random_states(hetero: MakeTrainer, tmp_path: Path) -> None:
    model, trainer = Classifier(), hetero()
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    weights = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert whole.keys() - weights.keys() == {"callbacks", "lr_schedulers", "optimizer_states", "lightning_hetero"}
    assert difference(Classifier.load_from_checkpoint(tmp_path / "weights.ckpt"), model) == 0.0
    trainer.validate(Classifier(), data(), ckpt_path=tmp_path / "weights.ckpt", verbose=False)


def test_user_code_sees_the_keys_of_lightning_only(hetero: MakeTrainer, tmp_path: Path) -> None:
    class Looks(Classifier):
        seen: list[set[str]]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.saved = checkpoint

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint

    model, trainer = Looks(), hetero()
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hetero(max_epochs=2).fit(model, data(), ckpt_path=tmp_path / "last.ckpt")
    assert model.loaded.keys() == model.saved.keys()
    assert "lightning_hetero" not in model.saved


@pytest.mark.feature("checkpoints: resuming in plain Lightning, and back")
def test_plain_lightning_resumes_from_it(hetero: MakeTrainer, plain: MakeTrainer, tmp_path: Path) -> None:
    trainer = hetero()
    trainer.fit(Classifier(), data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, whole = Classifier(), Classifier()
    plain(max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt")
    plain(max_epochs=2).fit(whole, data())
    assert difference(resumed, whole) < 1e-12


@pytest.mark.feature("checkpoints: files that have changed since they were written", "refused")
def test_a_damaged_checkpoint_ends_the_run_before_anything_is_loaded(hetero: MakeTrainer, tmp_path: Path) -> None:
    trainer = hetero()
    trainer.fit(Classifier(), data())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    damage(path)
    model, fresh = Classifier(), Classifier()
    for run in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(CheckpointError, match=f"checkpoint {path} is damaged"):
            run(model, data(), ckpt_path=path)
    assert difference(model, fresh) == 0.0


@pytest.mark.feature("checkpoints: AsyncCheckpointIO")
def test_in_the_background_it_is_the_same(hetero: MakeTrainer, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=2)
    trainer = hetero(callbacks=[keeper], enable_checkpointing=True, plugins=[AsyncCheckpointIO()])
    trainer.fit(Classifier(), data())
    assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
    assert isinstance(trainer.strategy.checkpoint_io.checkpoint_io, HeteroCheckpointIO)
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 2
    assert all_sealed(tmp_path / "kept")


def test_what_goes_wrong_in_the_background_reaches_the_user(
    hetero: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "last.ckpt" / "shard").mkdir(parents=True)

    class Saves(Classifier):
        def on_train_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(CheckpointError, match="a folder has that name"):
        hetero(strategy={"checkpoint_io": AsyncCheckpointIO()}).fit(Saves(), data())
    assert "could not be gathered" not in caplog.text


@pytest.mark.parametrize("fails", [True, False])
def test_a_file_is_removed_once_what_takes_its_place_is_written(
    fails: bool, hetero: MakeTrainer, tmp_path: Path, names: Names
) -> None:
    may_write = threading.Event()

    class Waits(HeteroCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            may_write.wait(20)
            super().save_checkpoint(checkpoint, tmp_path / "a" / "b" if fails and "new" in str(path) else path)

    class Saves(Classifier):
        def on_train_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "old.ckpt")
            self.trainer.save_checkpoint(tmp_path / "new.ckpt")
            self.trainer.strategy.remove_checkpoint(tmp_path / "old.ckpt")
            may_write.set()

    (tmp_path / "a").write_text("in the way")
    trainer = hetero(strategy={"checkpoint_io": AsyncCheckpointIO(Waits())})
    with pytest.raises(CheckpointError) if fails else nullcontext():
        trainer.fit(Saves(), data())
    assert names(tmp_path) == {"a", "old.ckpt" if fails else "new.ckpt"}


@pytest.mark.feature("checkpoints: a CheckpointIO of one's own")
def test_the_users_own_checkpoint_io_is_used(hetero: MakeTrainer, tmp_path: Path) -> None:
    class Counts(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            self.saved += 1
            super().save_checkpoint(*arguments, **options)

    by_plugin, by_strategy = Counts(), Counts()
    for trainer in (hetero(plugins=[by_plugin]), hetero(strategy={"checkpoint_io": by_strategy})):
        trainer.fit(Classifier(), data())
        trainer.save_checkpoint(tmp_path / "own.ckpt")
    assert (by_plugin.saved, by_strategy.saved) == (1, 1)
    with (tmp_path / "own.ckpt").open("rb") as file:
        assert not is_sealed(file)


@pytest.mark.feature("checkpoints: OnExceptionCheckpoint")
@pytest.mark.filterwarnings("ignore:.*The last model of the previous `fit` call will be used")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_on_an_exception_the_run_is_saved_whole(hetero: MakeTrainer, tmp_path: Path) -> None:
    class Fails(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 3:
                raise ArithmeticError("at step 3")

    class Keeps(OnExceptionCheckpoint):
        def teardown(self, *_: Any, **__: Any) -> None:
            """Lightning removes the file when the same program goes on to a regular end."""

    with pytest.raises(ArithmeticError, match="at step 3"):
        hetero(callbacks=[Keeps(tmp_path)], enable_checkpointing=True).fit(Fails(), data())
    assert torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["global_step"] == 3
    assert all_sealed(tmp_path)
    resumed = Classifier()
    hetero(max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert resumed.trainer.global_step == 10


def test_a_strategy_that_resumed_can_be_copied() -> None:
    import copy

    strategy = HeteroStrategy()
    strategy._of_checkpoint = strategy._to_resume = {"random_states": []}
    copied = copy.deepcopy(strategy)
    assert copied._of_checkpoint is copied._to_resume is None
