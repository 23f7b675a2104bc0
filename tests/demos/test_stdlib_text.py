"""What the text of the standard library is cut into."""

from __future__ import annotations

import pytest
import torch

from lightning_hetero.demos.stdlib_text import ByteWindows, StdlibTextDataModule


def texts(**options: int) -> dict[str, bytes]:
    data = StdlibTextDataModule(**options)
    data.setup("fit")
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    return {name: bytes(loader.dataset.text.tolist()) for name, loader in loaders.items()}


def test_every_byte_is_followed_by_its_target() -> None:
    windows = ByteWindows(b"abcdefg", context=3)
    read = [(bytes(ids.tolist()), bytes(targets.tolist())) for ids, targets in map(windows.__getitem__, range(2))]
    assert read == [(b"abc", b"bcd"), (b"def", b"efg")]
    assert len(windows) == 2
    with pytest.raises(IndexError, match="window 2 of 2"):
        windows[2]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a text of 3 bytes holds no window of 3 and the byte after it"):
        ByteWindows(b"abc", context=3)


def test_the_size_is_capped_and_the_choice_of_files_is_not_random() -> None:
    first = texts(max_bytes=300_000)
    torch.manual_seed(5)
    assert texts(max_bytes=300_000) == first
    assert sum(map(len, first.values())) == 300_000


def test_files_go_to_one_set_whole() -> None:
    small, large = texts(max_bytes=300_000), texts(max_bytes=600_000)
    for name, text in small.items():
        assert large[name].startswith(text)
    assert len(small["train"]) > len(small["val"]) + len(small["test"])


def test_an_incomplete_batch_is_left_out_in_training_only() -> None:
    data = StdlibTextDataModule(max_bytes=300_000, batch_size=7)
    data.setup("fit")
    rows = {len(ids) for ids, _ in data.train_dataloader()}
    assert rows == {7}
    assert sum(len(ids) for ids, _ in data.val_dataloader()) == len(data.val_dataloader().dataset)


def test_a_loader_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\) first"):
        StdlibTextDataModule().val_dataloader()


def test_a_python_without_sources_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no source files of the standard library"):
        texts()
