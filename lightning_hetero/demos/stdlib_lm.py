"""A small GPT that learns, byte by byte, the source of Python's own standard library."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_hetero.demos.stdlib_text import Batch, StdlibTextDataModule

__all__ = ["Block", "CausalSelfAttention", "StdlibTextDataModule", "TinyGPT"]

BYTES = 256  # size of the vocabulary


class CausalSelfAttention(nn.Module):
    """Attention of every byte to itself and the bytes before it.

    Args:
        dim: Features of a byte.
        heads: Number of heads; divides `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} cannot be shared by heads={heads}; choose a multiple")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix features of shape (rows, length, dim) along the length; same shape."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input.

    Args:
        dim: Features of a byte.
        heads: Heads of the attention.
        dropout: Chance that a feature of either branch is dropped in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CausalSelfAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Refine features of shape (rows, length, dim); same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return cast(Tensor, x + self.dropout(self.mlp(self.mlp_norm(x))))


class TinyGPT(pl.LightningModule):
    """A decoder-only transformer over bytes, whose embedding is also its output layer.

    Args:
        context: Longest text it can read, in bytes.
        dim: Features of a byte.
        depth: Number of blocks.
        heads: Heads of each attention.
        dropout: Chance that a feature is dropped in training.
        lr: Learning rate of AdamW after the warm-up.
        warmup_steps: Steps in which the learning rate grows to `lr`.

    References:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
        Press and Wolf, Using the Output Embedding to Improve Language Models, EACL 2017.
    """

    def __init__(
        self,
        context: int = 128,
        dim: int = 96,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        lr: float = 2e-3,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.warmup_steps = lr, warmup_steps
        self.embedding = nn.Embedding(BYTES, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, BYTES, bias=False)
        self.apply(_initialize)
        self.head.weight = self.embedding.weight
        metrics = MetricCollection(
            {"bits_per_byte": MeanMetric(), "acc": MulticlassAccuracy(num_classes=BYTES, average="micro")}
        )
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def forward(self, ids: Tensor) -> Tensor:
        """Give the logits of the next byte, (rows, length, 256), for bytes of shape (rows, length)."""
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of a batch, in nats per byte."""
        return self._step("train", batch, self.train_metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, bits per byte and accuracy on the validation text."""
        self._step("val", batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss, bits per byte and accuracy on the test text."""
        self._step("test", batch, self.test_metrics)

    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate rising linearly and then constant."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _step(self, stage: str, batch: Batch, metrics: MetricCollection) -> Tensor:
        ids, following = batch
        logits = self(ids).flatten(0, 1)
        loss = F.cross_entropy(logits, following.flatten())
        metrics["bits_per_byte"].update(loss.detach() / math.log(2), weight=following.numel())
        metrics["acc"].update(logits, following.flatten())
        in_training = stage == "train"
        self.log(f"{stage}/loss", loss, on_step=in_training, on_epoch=not in_training, batch_size=len(ids))
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=not in_training, batch_size=len(ids))
        return loss


def _initialize(module: nn.Module) -> None:
    """Start from small weights, as GPT-2 does: the embedding is the output layer too, and must not shout."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
