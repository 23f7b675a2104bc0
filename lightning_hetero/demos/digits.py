"""Handwritten digits of scikit-learn, read by a small convolutional network.

The data set (1797 images of 8 × 8 pixels) is part of scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from typing import cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, ...]
"""Images (rows, 1, 8, 8) in float32 from 0 to 1, and labels (rows,) in int64 from 0 to 9."""


class DigitsDataModule(pl.LightningDataModule):
    """Train, validation and test set: 70 %, 10 % and 20 % of the images.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load data. The set is in memory, so 0 is fastest.
        seed: Decides which image is in which set, apart from the seed of the training.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._sets: list[Subset[Batch]] | None = None

    def setup(self, stage: str) -> None:
        """Read the images and split them, once for all stages."""
        if self._sets is None:
            split_rng = torch.Generator().manual_seed(self.seed)
            self._sets = [*random_split(_load_digits(), [0.7, 0.1, 0.2], generator=split_rng)]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the training set in random order."""
        return self._loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation set."""
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test set."""
        return self._loader(2)

    def _loader(self, index: int, shuffle: bool = False) -> DataLoader[Batch]:
        if self._sets is None:
            raise RuntimeError("the digits are not loaded yet; call setup('fit') first, as the Trainer does")
        return DataLoader(self._sets[index], batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


class DigitsCNN(pl.LightningModule):
    """Three convolutions with batch normalisation, then two linear layers.

    Args:
        width: Channels of the first two convolutions; the third has twice as many.
        lr: Learning rate of Adam.
    """

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.features = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * 2 * 2, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        self.train_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits of the ten digits, shape (rows, 10), for images of shape (rows, 1, 8, 8)."""
        return cast(Tensor, self.classifier(self.features(images)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        return self._step("train", batch, self.train_acc)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on the validation set."""
        self._step("val", batch, self.val_acc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on the test set."""
        self._step("test", batch, self.test_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam with its usual moments."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def _step(self, stage: str, batch: Batch, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    """A 3 × 3 convolution that keeps the size of the image. Its bias would be undone by the normalisation."""
    return (
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def _load_digits() -> TensorDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # stored as 0 to 16
    return TensorDataset(images, torch.as_tensor(bunch.target, dtype=torch.int64))
