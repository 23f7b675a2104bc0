"""What the digits demo promises: fixed splits, and a network that learns them."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import pytest
import torch

from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def images_of(loader: torch.utils.data.DataLoader) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in loader for image in images}


def ready(**options: int) -> DigitsDataModule:
    data = DigitsDataModule(**options)
    data.setup("fit")
    return data


def test_all_images_are_shared_out_over_three_sets() -> None:
    data = ready()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [len(loader.dataset) for loader in loaders] == [1258, 180, 359]
    # Fewer than 1797 images in the three sets together would mean that two of them share one.
    assert len(set.union(*map(images_of, loaders))) == 1797


def test_the_split_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = images_of(ready(seed=3).test_dataloader())
    torch.manual_seed(2)
    assert images_of(ready(seed=3, batch_size=7).test_dataloader()) == first
    assert images_of(ready(seed=4).test_dataloader()) != first


def test_splitting_draws_nothing_from_the_seed_of_the_training() -> None:
    state = torch.get_rng_state()
    ready()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\) first"):
        DigitsDataModule().train_dataloader()


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        ready()


def trained(epochs: int) -> dict[str, float]:
    pl.seed_everything(1, verbose=False)
    model, data = DigitsCNN(), DigitsDataModule()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]


def test_six_epochs_are_enough_to_read_the_test_digits() -> None:
    assert trained(epochs=6)["test/acc"] >= 0.97


def test_equal_seeds_train_alike_bit_for_bit() -> None:
    assert trained(epochs=1) == trained(epochs=1)
