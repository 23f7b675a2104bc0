"""A checkpoint that carries its own sha256, so that a changed bit is found before anything is loaded.

`torch.save` writes a zip archive. The seal is the comment of that archive: the last bytes of the file, which all
readers of zip archives pass over, torch's own among them. It is written together with the rest, and a file that is
copied or moved keeps it. The bytes of a sealed file are

    what `torch.save` wrote, up to the last two bytes (the length of the comment, which was 0)
    the length of the comment, 2 bytes
    `lightning_hetero sha256 `
    the sha256 of everything before, as 64 hexadecimal digits
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, BinaryIO

import torch

MARK = b"lightning_hetero sha256 "
_DIGITS = 64
_SEAL_BYTES = len(MARK) + _DIGITS
ZIP_BEGINS = b"PK\x03\x04"
_ZIP_ENDS = b"PK\x05\x06"
_ZIP_END_BYTES = 22  # of the end of a zip archive without a comment; the last two are the length of the comment
_CHUNK_BYTES = 2**20


class BrokenSealError(Exception):
    """The bytes of a file are not those that were written. The text says what is wrong, as part of a sentence."""


def save_sealed(value: Any, file: BinaryIO) -> None:
    """As `torch.save`, with a seal at the end.

    Args:
        value: What to save.
        file: Open for writing, and empty.

    Raises:
        OSError: The file cannot be written.
    """
    writer = _Sealing(file)
    torch.save(value, writer)  # type: ignore[arg-type]  # whatever has `write` will do
    writer.seal()


def is_sealed(file: BinaryIO) -> bool:
    """Whether a file has a seal, which is right then. Without one nobody can say whether the file is whole.

    Args:
        file: Open for reading, and seekable.

    Raises:
        BrokenSealError: The file has changed since it was sealed, or is no whole file.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes == 0:
        raise BrokenSealError("it is empty")
    file.seek(max(size_bytes - _SEAL_BYTES, 0))
    end = file.read()
    file.seek(0)
    if end.startswith(MARK):
        if _sha256(file, size_bytes - _DIGITS) != end[-_DIGITS:]:
            raise BrokenSealError("its bytes do not have the sha256 that was written with them")
        return True
    # One flipped bit may have hidden the seal: only what ends as torch.save ends has none.
    if _ends_without_comment(end[-_ZIP_END_BYTES:]):
        return False
    if file.read(len(ZIP_BEGINS)) == ZIP_BEGINS:
        raise BrokenSealError("its end is missing or has changed")
    return False


def _ends_without_comment(end: bytes) -> bool:
    return end.startswith(_ZIP_ENDS) and end.endswith(b"\0\0")


def _sha256(file: BinaryIO, size_bytes: int) -> bytes:
    """Of so many bytes from where the file stands, as hexadecimal digits."""
    digest = hashlib.sha256()
    while size_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, size_bytes))):
        digest.update(chunk)
        size_bytes -= len(chunk)
    return digest.hexdigest().encode()


class _Sealing:
    """The file that `torch.save` writes to. It keeps back the end of the archive, which the seal changes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._end = b""
        self._error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Take the next bytes. `seal` raises what goes wrong, Ctrl-C too: torch would make another error of it."""
        if self._error is None:
            try:
                self._take(memoryview(data))
            except BaseException as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Nothing yet: torch calls this when the archive is written, and the seal comes after it."""

    def seal(self) -> None:
        """Write the end.

        Raises:
            OSError: Some bytes could not be written.
        """
        if self._error is not None:
            raise self._error
        if _ends_without_comment(self._end):
            self._put(self._end[:-2] + _SEAL_BYTES.to_bytes(2, "little") + MARK)
            self._put(self._digest.hexdigest().encode())
        else:  # no archive: somebody has put a function of their own in the place of `torch.save`
            self._put(self._end)

    def _take(self, data: memoryview) -> None:
        if len(data) < _ZIP_END_BYTES:
            data = memoryview(self._end + bytes(data))
        else:
            self._put(self._end)
        border = max(len(data) - _ZIP_END_BYTES, 0)
        self._put(data[:border])
        self._end = bytes(data[border:])

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
