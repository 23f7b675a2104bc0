"""Saving and loading: what is refused, in which words, and what goes through as in plain Lightning."""

from __future__ import annotations

import importlib
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_hetero.errors import CheckpointError
from lightning_hetero.strategy.checkpoint_files import is_sealed
from lightning_hetero.strategy.lightning_pytorch import HeteroCheckpointIO

Names = Callable[[Path], set[str]]
FLIPS = 1000


@pytest.fixture
def path(files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint that is whole."""
    files.save_checkpoint(state, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def flip(path: Path, bit: int) -> None:
    """One bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_what_was_saved_is_loaded(files: HeteroCheckpointIO, state: dict[str, Any], path: Path) -> None:
    loaded = files.load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["weight"], state["state_dict"]["weight"])
    assert loaded["epoch"] == 3


def test_a_thousand_flipped_bits_are_all_refused(files: HeteroCheckpointIO, path: Path) -> None:
    chance = random.Random(0)
    size_bits = 8 * path.stat().st_size
    refused = 0
    for bit in (chance.randrange(size_bits) for _ in range(FLIPS)):
        flip(path, bit)
        with pytest.raises(CheckpointError):
            files.load_checkpoint(path)
        flip(path, bit)
        refused += 1
    assert refused == FLIPS
    assert files.load_checkpoint(path)["epoch"] == 3


def test_plain_lightning_and_ours_read_each_others_files(
    files: HeteroCheckpointIO, state: dict[str, Any], path: Path, tmp_path: Path
) -> None:
    plain = TorchCheckpointIO()
    assert torch.equal(plain.load_checkpoint(path)["state_dict"]["weight"], state["state_dict"]["weight"])
    plain.save_checkpoint(state, tmp_path / "plain.ckpt")
    loaded = files.load_checkpoint(tmp_path / "plain.ckpt")
    assert torch.equal(loaded["state_dict"]["weight"], state["state_dict"]["weight"])


def test_a_file_of_the_old_format_of_torch_is_read(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert files.load_checkpoint(tmp_path / "old.ckpt")["epoch"] == 3


def test_the_error_names_the_file_and_the_newest_whole_one_beside_it(
    files: HeteroCheckpointIO, state: dict[str, Any], path: Path
) -> None:
    other, older = path.with_name("epoch=2.ckpt"), path.with_name("epoch=1.ckpt")
    files.save_checkpoint(state, older)
    files.save_checkpoint(state, other)
    torch.save(state, path.with_name("plain.ckpt"))  # nobody can say whether it is whole
    flip(path, 4000)
    with pytest.raises(CheckpointError) as caught:
        files.load_checkpoint(path)
    assert str(caught.value) == (
        f"checkpoint {path} is damaged: its bytes do not have the sha256 that was written with them. Nothing of it was "
        f"loaded. The newest whole one in the same folder is {other}."
    )
    flip(other, 4000)
    with pytest.raises(CheckpointError, match=f"The newest whole one in the same folder is {older}"):
        files.load_checkpoint(path)
    flip(older, 4000)
    with pytest.raises(CheckpointError, match="Take an older checkpoint, or a copy of this one"):
        files.load_checkpoint(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b""), "is damaged: it is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "is damaged: its end is missing or has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-88]), "is damaged: its end is missing or has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:2]), "cannot be read: it is no file that torch.save wrote"),
        (lambda path: path.write_text("epoch: 3\n"), "cannot be read: it is no file that torch.save wrote"),
        (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, and that of a Trainer is a dict"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder, as strategies that write several files make them"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(
    spoil: Callable[[Path], Any], words: str, files: HeteroCheckpointIO, path: Path
) -> None:
    spoil(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        files.load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_what_torch_refuses_to_unpickle_is_refused_in_its_words(files: HeteroCheckpointIO, tmp_path: Path) -> None:
    files.save_checkpoint({"state_dict": {}, "object": Path("x")}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        files.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert files.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)["object"] == Path("x")


def test_a_file_that_does_not_exist_is_the_error_of_lightning(files: HeteroCheckpointIO, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*none\.ckpt"):
        files.load_checkpoint(tmp_path / "none.ckpt")


def test_a_folder_of_the_same_name_is_not_overwritten(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt" / "shard").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="a folder has that name"):
        files.save_checkpoint(state, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt" / "shard").is_dir()


def test_storage_options_are_refused_as_by_lightning(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="with `storage_options` arg is not supported for `HeteroCheckpointIO`"):
        files.save_checkpoint(state, tmp_path / "last.ckpt", storage_options={"key": 1})


def test_a_project_that_replaces_the_method_of_lightnings_class_gets_what_it_wrote(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    monkeypatch.setattr(
        TorchCheckpointIO, "save_checkpoint", lambda self, *what, **options: saved.append((*what, options))
    )
    files.save_checkpoint(state, tmp_path / "last.ckpt")
    assert saved == [(state, tmp_path / "last.ckpt", {"storage_options": None})]
    assert not (tmp_path / "last.ckpt").exists()


def test_a_project_that_replaces_torch_save_gets_what_it_wrote(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", lambda value, file: file.write(b"of another kind"))
    files.save_checkpoint(state, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == b"of another kind"
    monkeypatch.setattr(torch, "save", lambda value, file: None)
    files.save_checkpoint(state, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == b""


def test_an_object_that_cannot_be_pickled_leaves_the_old_file(
    files: HeteroCheckpointIO, path: Path, tmp_path: Path, names: Names
) -> None:
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"[Pp]ickle"):
        files.save_checkpoint({"state_dict": {}, "object": lambda: None}, path)
    assert path.read_bytes() == before
    assert names(tmp_path) == {"last.ckpt"}


@pytest.mark.feature("checkpoints: a full disk leaves the old file")
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_where_the_disk_takes_no_more_the_old_file_stays_whole(
    part: float,
    files: HeteroCheckpointIO,
    state: dict[str, Any],
    path: Path,
    tmp_path: Path,
    largest_file: Callable[[int], None],
    names: Names,
) -> None:
    before = path.read_bytes()
    largest_file(int(part * (len(before) - 1)))
    with pytest.raises(CheckpointError) as caught:
        files.save_checkpoint(state, path)
    assert str(caught.value) == (
        f"checkpoint {path} could not be written: File too large. Nothing of it remains, and a checkpoint of that name "
        "from before is as it was. Make room or give write access there, or choose another folder."
    )
    assert path.read_bytes() == before
    assert names(tmp_path) == {"last.ckpt"}


@pytest.mark.root
def test_on_a_full_disk_the_old_file_stays_whole(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path, names: Names
) -> None:
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("a disk that is full is a small tmpfs, and only root may mount one")
    try:
        files.save_checkpoint({**state, "state_dict": {}}, tmp_path / "last.ckpt")
        with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
            files.save_checkpoint({**state, "more": torch.ones(10_000)}, tmp_path / "last.ckpt")
        assert files.load_checkpoint(tmp_path / "last.ckpt")["state_dict"] == {}
        assert names(tmp_path) == {"last.ckpt"}
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_cannot_be_made_is_named(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/last\.ckpt could not be written: "):
        files.save_checkpoint(state, tmp_path / "file" / "last.ckpt")


def test_an_address_with_file_is_a_local_path(
    files: HeteroCheckpointIO, state: dict[str, Any], tmp_path: Path, names: Names
) -> None:
    files.save_checkpoint(state, f"file://{tmp_path}/last.ckpt")
    assert files.load_checkpoint(f"file://{tmp_path}/last.ckpt")["epoch"] == 3
    assert names(tmp_path) == {"last.ckpt"}


@pytest.fixture
def in_memory() -> Iterator[str]:
    """An address of fsspec that is no local path."""
    yield "memory://checkpoints-of-a-test"
    fsspec.filesystem("memory").store.clear()


@pytest.mark.feature("checkpoints: addresses of fsspec")
def test_other_addresses_are_sealed_and_verified(
    files: HeteroCheckpointIO, state: dict[str, Any], in_memory: str
) -> None:
    address = f"{in_memory}/run/last.ckpt"
    files.save_checkpoint(state, address)
    files.save_checkpoint(state, address)
    assert files.load_checkpoint(address)["epoch"] == 3
    with fsspec.open(address, "rb") as file:
        assert is_sealed(file)
        file.seek(0)
        data = bytearray(file.read())
    data[len(data) // 2] ^= 1
    with fsspec.open(address, "wb") as file:
        file.write(bytes(data))
    with pytest.raises(CheckpointError, match=f"checkpoint {address} is damaged"):
        files.load_checkpoint(address)
    files.remove_checkpoint(address)
    with pytest.raises(FileNotFoundError):
        files.load_checkpoint(address)


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_both_namespaces_of_lightning_have_one(namespace: str) -> None:
    face = importlib.import_module(f"lightning_hetero.strategy.{namespace.replace('.', '_')}")
    checkpoint_io = face.HeteroStrategy().checkpoint_io
    assert type(checkpoint_io) is face.HeteroCheckpointIO
    assert isinstance(checkpoint_io, importlib.import_module(f"{namespace}.plugins").TorchCheckpointIO)
