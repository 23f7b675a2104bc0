"""Checkpoints are those of plain Lightning: they open anywhere and resume anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference

PLACES = ["plain", "round_robin", "even", "single"]


def devices_in(obj: Any) -> set[str]:
    if isinstance(obj, torch.Tensor):
        return {obj.device.type}
    values = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return set().union(*map(devices_in, values))


@pytest.mark.feature("checkpoints: resuming under another placement")
@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", PLACES)
@pytest.mark.parametrize("name", ["tied_transformer", "convnet"])
def test_a_run_resumes_under_any_other_placement_with_equal_losses(
    first: str, second: str, name: str, plain: Any, hetero: Any, tmp_path: Path
) -> None:
    def trainer(place: str, **options: Any) -> Any:
        return plain(**options) if place == "plain" else hetero(placement=place, **options)

    whole = Classifier(name)
    plain(max_epochs=4).fit(whole, data(name))

    started = Classifier(name)
    run = trainer(first, max_epochs=2)
    run.fit(started, data(name))
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert devices_in(saved) == {"cpu"}

    resumed = Classifier(name)
    trainer(second, max_epochs=4).fit(resumed, data(name), ckpt_path=path)
    torch.testing.assert_close(started.losses + resumed.losses, whole.losses, rtol=1e-9, atol=1e-9)
    assert difference(resumed, whole) < 1e-8


@pytest.mark.feature("checkpoints: tensors of the CPU only")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_written_in_the_middle_of_a_run_names_no_device(hetero: Any, plain: Any, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=5, save_top_k=-1)
    hetero(callbacks=[keeper], enable_checkpointing=True).fit(Classifier(), data())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert devices_in(saved) == {"cpu"}
        fresh = Classifier.load_from_checkpoint(file)
        assert difference(fresh, fresh) == 0.0
    resumed = Classifier()
    plain(max_epochs=2).fit(resumed, data(), ckpt_path=files[0])
    whole = Classifier()
    plain(max_epochs=2).fit(whole, data())
    assert difference(resumed, whole) == 0.0


def test_tied_weights_are_stored_once(hetero: Any, tmp_path: Path) -> None:
    trainer = hetero(max_epochs=1)
    path = tmp_path / "tied.ckpt"
    seen: list[bool] = []

    class Saves(Classifier):
        def on_train_end(self) -> None:
            trainer.save_checkpoint(path)
            state = trainer.strategy.lightning_module_state_dict()
            seen.append(state["net.head.weight"].data_ptr() == state["net.embed.weight"].data_ptr())

    trainer.fit(Saves("tied_transformer"), data("tied_transformer"))
    assert seen == [True]
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["net.head.weight"].data_ptr() == state["net.embed.weight"].data_ptr()


def test_the_state_dict_keeps_the_names_of_the_model(hetero: Any) -> None:
    class Looks(Classifier):
        keys: list[str]

        def on_train_start(self) -> None:
            self.keys = list(self.state_dict())

    model = Looks()
    before = list(model.state_dict())
    hetero(max_epochs=1).fit(model, data())
    assert model.keys == before


def test_optimizer_state_stands_beside_its_parameter(hetero: Any, accelerator: EmulatedAccelerator) -> None:
    class Looks(Classifier):
        pairs: set[tuple[str, str]]

        def on_train_end(self) -> None:
            optimizer = self.trainer.optimizers[0]
            self.pairs = {(str(p.device), str(s["exp_avg"].device)) for p, s in optimizer.state.items()}

    model = Looks()
    hetero(max_epochs=1).fit(model, data())
    places = ["cpu", *accelerator.devices[:2]]
    assert model.pairs == {(place, place) for place in places}
