"""The source of Python's own standard library as a text to learn, byte by byte.

The text comes with every Python, so nothing is downloaded.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}

Batch = tuple[Tensor, Tensor]
"""Bytes (rows, context) and the byte that follows each of them, same shape, both int64 from 0 to 255."""


class ByteWindows(Dataset[Batch]):
    """A text cut into windows of equal length that do not overlap.

    Args:
        text: The bytes to learn.
        context: Bytes in a window.
    """

    def __init__(self, text: bytes, context: int) -> None:
        if len(text) <= context:
            raise ValueError(
                f"a text of {len(text)} bytes holds no window of {context} and the byte after it; "
                "give more text (max_bytes) or a smaller context"
            )
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.text[index * self.context : (index + 1) * self.context + 1].long()
        return window[:-1], window[1:]


class StdlibTextDataModule(pl.LightningDataModule):
    """The standard library's source files: eight of ten to train, one to validate, one to test.

    The choice is not random: files are taken in the order of a hash of their names, which mixes the
    packages, until `max_bytes` are read. Another version of Python has other files.

    Args:
        context: Bytes that the model sees at once.
        batch_size: Windows in a batch.
        max_bytes: Bytes read in total.
        num_workers: Processes that load data. The text is in memory, so 0 is fastest.
    """

    def __init__(
        self, context: int = 128, batch_size: int = 16, max_bytes: int = 1_000_000, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.num_workers = num_workers
        self._sets: dict[str, ByteWindows] = {}

    def setup(self, stage: str) -> None:
        """Read the files, once for all stages."""
        if not self._sets:
            texts = {"train": bytearray(), "val": bytearray(), "test": bytearray()}
            for index, source in enumerate(_read_sources(self.max_bytes)):
                texts[{8: "val", 9: "test"}.get(index % 10, "train")] += source
            self._sets = {name: ByteWindows(bytes(text), self.context) for name, text in texts.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the training text in random order; an incomplete last one is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation text."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test text."""
        return self._loader("test")

    def _loader(self, name: str, **options: Any) -> DataLoader[Batch]:
        if not self._sets:
            raise RuntimeError("the text is not read yet; call setup('fit') first, as the Trainer does")
        return DataLoader(self._sets[name], batch_size=self.batch_size, num_workers=self.num_workers, **options)


def _read_sources(max_bytes: int) -> Iterator[bytes]:
    """Read source files in the order of a hash of their names until `max_bytes` have been read."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    kept = [name for name in names if not _SKIPPED_FOLDERS.intersection(name.split("/"))]
    if not kept:
        raise FileNotFoundError(f"no source files of the standard library in {root}; is this Python frozen?")
    left = max_bytes
    for name in sorted(kept, key=lambda name: (zlib.crc32(name.encode()), name)):
        source = (root / name).read_bytes()[:left]
        left -= len(source)
        yield source
        if left == 0:
            return
