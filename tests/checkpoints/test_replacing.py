"""A name stands for the old file or for the new one, and nothing else is left in the folder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hetero.strategy.checkpoint_files.replacing import PREFIX, SUFFIX, remove_left_behind, replacing

Names = Callable[[Path], set[str]]


def write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def left_behind(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX}*{SUFFIX}"))


def test_it_writes_and_overwrites(tmp_path: Path, names: Names) -> None:
    path = tmp_path / "last.ckpt"
    write(path, b"one")
    write(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == {"last.ckpt"}


def test_folders_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "last.ckpt", b"one")
    assert (tmp_path / "a" / "b" / "last.ckpt").read_bytes() == b"one"


def test_until_the_block_ends_the_name_stands_for_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path, names: Names
) -> None:
    def fail(path: Path) -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise error

    path = tmp_path / "last.ckpt"
    write(path, b"old")
    with pytest.raises(error):
        fail(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"last.ckpt"}


@pytest.mark.parametrize("at_once", [True, False])
def test_a_disk_that_takes_no_more_leaves_the_old_file(
    at_once: bool, tmp_path: Path, largest_file: Callable[[int], None], names: Names
) -> None:
    def write_much(path: Path) -> None:
        with replacing(path) as file:
            for _ in range(1 if at_once else 100):
                file.write(bytes(10000 if at_once else 100))

    path = tmp_path / "last.ckpt"
    write(path, b"old")
    largest_file(5000)
    with pytest.raises(OSError, match="too large"):
        write_much(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"last.ckpt"}


def test_the_disk_has_every_byte_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "last.ckpt"
    flushed: list[tuple[str, bool, int]] = []
    flush = os.fsync

    def noted(descriptor: int) -> None:
        entry = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((entry.name if entry.is_dir() else "file", path.exists(), os.fstat(descriptor).st_size))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write(path, b"four")
    assert [(name, exists) for name, exists, _ in flushed] == [(tmp_path.name, False), ("file", False), ("new", True)]
    assert flushed[1][2] == 4


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "epoch=1.ckpt", tmp_path / "last.ckpt"
    write(target, b"one")
    link.symlink_to(target.name)
    write(link, b"two")
    assert not link.is_symlink()
    assert (target.read_bytes(), link.read_bytes()) == (b"one", b"two")


def test_a_link_to_nothing_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "last.ckpt"
    link.symlink_to("gone.ckpt")
    write(link, b"two")
    assert link.read_bytes() == b"two"


def test_who_may_read_the_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "last.ckpt", b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "last.ckpt").stat().st_mode) == 0o640


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_hetero.strategy.checkpoint_files.replacing import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path: Path, names: Names) -> None:
    path = tmp_path / "last.ckpt"
    write(path, b"old")
    ran = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(left_behind(tmp_path)) == 1
    write(path, b"new")
    assert names(tmp_path) == {"last.ckpt"}


def test_files_that_somebody_writes_just_now_are_not_left_behind(tmp_path: Path, names: Names) -> None:
    with replacing(tmp_path / "one.ckpt") as one:
        one.write(b"1")
        remove_left_behind(tmp_path)
        assert len(left_behind(tmp_path)) == 1
        write(tmp_path / "two.ckpt", b"2")
    assert names(tmp_path) == {"one.ckpt", "two.ckpt"}


def test_lightning_takes_what_is_left_behind_for_no_checkpoint(tmp_path: Path) -> None:
    with replacing(tmp_path / "hpc_ckpt_7.ckpt") as file:
        file.write(b"1")
        (name,) = [path.name for path in tmp_path.iterdir()]
        assert not name.endswith(".ckpt")
        assert "ckpt_" not in name
        assert "last" not in name
