"""A decoder-only transformer in the style of LLaMA, of any size, to plan for."""

from __future__ import annotations

from typing import cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
"""Tokens (rows, context) and the token that follows each of them, same shape, both int64."""


class DecoderBlock(nn.Module):
    """Causal attention, then a gated perceptron, each normalised before and added to its input.

    Args:
        dim: Features of a token.
        heads: Heads of the attention; divides `dim`.
        hidden: Features inside of the perceptron.

    References:
        Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Refine features of shape (rows, length, dim); same shape."""
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return cast(Tensor, x + self.down(F.silu(self.gate(y)) * self.up(y)))


class Decoder(pl.LightningModule):
    """Embedding, blocks, and an output layer of its own. Positions are learnt.

    Args:
        vocabulary: Number of tokens.
        context: Longest text it can read, in tokens.
        dim: Features of a token.
        depth: Number of blocks.
        heads: Heads of each attention; divides `dim`.
        hidden: Features inside of each perceptron.
        lr: Learning rate of AdamW.
    """

    _no_split_modules = ("DecoderBlock",)

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 64,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        hidden: int = 128,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.example_input_array = torch.zeros(1, context, dtype=torch.int64)

    def forward(self, ids: Tensor) -> Tensor:
        """Give the logits of the next token, (rows, length, vocabulary), for tokens of shape (rows, length)."""
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of a batch, in nats per token."""
        ids, following = batch
        loss = F.cross_entropy(self(ids).flatten(0, 1), following.flatten())
        self.log("train/loss", loss, batch_size=len(ids))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with its usual moments."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
