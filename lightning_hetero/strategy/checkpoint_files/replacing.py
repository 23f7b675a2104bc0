"""Writing a file so that its name always stands for a whole file: the old one until the new one is on the disk.

The bytes go to a temporary file in the same folder, hence the same file system; it is flushed to the disk, and takes
the name in one step. A process that is killed on the way leaves that temporary file behind. The lock on it dies with
the process, so the next one that writes to the folder can tell, and removes it.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":  # where there are no locks of this kind, and what killed processes leave stays
    import fcntl

# Says nothing about the file that it becomes: Lightning finds checkpoints by parts of their names.
PREFIX, SUFFIX = ".lightning-hetero-", ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends. If the block raises, `path` stays as it is.

    A symbolic link of that name is replaced, and what it points to stays as it is.

    Args:
        path: Its folder is made if it does not exist.

    Raises:
        OSError: The folder cannot be made, or the file not be written; nothing of it remains.
    """
    folder = path.parent
    _make_folder(folder)
    remove_left_behind(folder)
    temporary, file = _open_locked(folder)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":  # while the lock is still held
                temporary.replace(path)
        if sys.platform == "win32":  # Windows moves no open file
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(folder)


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; those of living ones stay."""
    if sys.platform == "win32":
        return
    for temporary in folder.glob(f"{PREFIX}*{SUFFIX}"):
        with suppress(OSError), temporary.open("r+b") as file:  # some network drives lock no file that is read
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def _open_locked(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        temporary = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        file = temporary.open("xb")
        if sys.platform == "win32":
            return temporary, file
        with suppress(OSError):  # a file system without locks: then nobody else takes it for left behind, either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink > 0:
            return temporary, file
        file.close()  # somebody tidied up between the two steps


def _make_folder(folder: Path) -> None:
    """With its parents, each on the disk before something stands in it."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    """Names of files are contents of their folder, and reach the disk with it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have nothing to flush there
            raise
    finally:
        os.close(descriptor)
