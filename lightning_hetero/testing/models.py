"""Small models, each with something that makes it hard to spread over devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolutions(nn.Module):
    """A function between two units, whose result both it and the second one keep. Input (rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        inner: Tensor = self.down(torch.relu(self.up(x.unsqueeze(1))))
        return inner.squeeze(1)


class MLP(nn.Module):
    """Three linear layers, called one after the other by the module's own code. Input (rows, 8), output (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Two hidden layers."""
        return self.third(torch.tanh(self.second(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """A chain with BatchNorm and in-place activations. Input (rows, 1, 8, 8), output (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Features, then head."""
        return self.head(self.features(x))  # type: ignore[no-any-return]


class TiedTransformer(nn.Module):
    """A language model whose head is its embedding, with a parameter of its own. Input (rows, 6) of integers below 11.

    Output (rows, 6, 11).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.zeros(6, 8))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token."""
        hidden = self.embed(tokens) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Two LSTM layers and a GRU. Input (rows, 5, 8), output (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores from the last time step."""
        hidden, _ = self.lstm(x)
        hidden, _ = self.gru(hidden)
        return self.head(hidden[:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """nn.MultiheadAttention, which uses its child's weight without calling the child. Input (rows, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores from the mean over time."""
        x = self.embed(x)
        mixed, _ = self.attention(x, x, x)
        return self.head((x + mixed).mean(1))  # type: ignore[no-any-return]


class Borrower(nn.Module):
    """Uses a layer's weight without calling the layer, and its own code mixes outputs. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 6, bias=False)
        self.middle = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.ModuleList([nn.Linear(8, 4), nn.Linear(6, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """Encode, and decode with the encoder's weight."""
        hidden = self.middle(self.encode(x)) * self.scale
        decoded = F.linear(hidden, self.encode.weight.t())
        return self.out[0](decoded) + self.out[1](hidden)  # type: ignore[no-any-return]


class InPlaceResidual(nn.Module):
    """A block that begins with an in-place activation, so that its caller's tensor changes. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.after = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The residual sees the rectified tensor, as on one device."""
        x = self.before(x)
        change = self.block(x)
        return self.after(x + change)  # type: ignore[no-any-return]


def rows_of_8(rows: int, generator: torch.Generator) -> Tensor:
    """Input of the models that take (rows, 8)."""
    return torch.randn(rows, 8, generator=generator, dtype=torch.float64)


def sequences(rows: int, generator: torch.Generator) -> Tensor:
    """Input of the models that take (rows, 5, 8)."""
    return torch.randn(rows, 5, 8, generator=generator, dtype=torch.float64)


def images(rows: int, generator: torch.Generator) -> Tensor:
    """Input of `ConvNet`."""
    return torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64)


def tokens(rows: int, generator: torch.Generator) -> Tensor:
    """Input of `TiedTransformer`."""
    return torch.randint(11, (rows, 6), generator=generator)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], Tensor]]] = {
    "mlp": (MLP, rows_of_8),
    "convnet": (ConvNet, images),
    "tied_transformer": (TiedTransformer, tokens),
    "recurrent": (Recurrent, sequences),
    "attention": (Attention, sequences),
    "borrower": (Borrower, rows_of_8),
    "in_place_residual": (InPlaceResidual, rows_of_8),
}
