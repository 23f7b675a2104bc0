"""Models that ask something of cutting: skips, structures, state, coupled rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Hourglass(nn.Module):
    """Skips from every level to its counterpart, so from device to device. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 2)])
        self.up = nn.ModuleList([nn.Linear(2, 4), nn.Linear(8, 6), nn.Linear(12, 8)])

    def forward(self, x: Tensor) -> Tensor:
        """Down, then up with the skips."""
        skips = []
        for level in self.down:
            x = torch.tanh(level(x))
            skips.append(x)
        x = skips.pop()
        for level in self.up:
            x = level(x)
            if skips:
                x = torch.cat([x, skips.pop()], -1)
        return x


class Twice(nn.Module):
    """Calls a layer twice, once with what the other layer made of it. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """The first layer before and after the second."""
        return self.a(torch.relu(self.b(self.a(x)))) + x  # type: ignore[no-any-return]


@dataclass
class Result:
    """A structure of user code."""

    rows: Tensor
    comment: str = ""


class Everything(nn.Module):
    """Takes and returns structures. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Inner(), nn.Linear(8, 4)

    def forward(self, batch: dict[str, Any], factor: float, shift: Tensor, flags: list[Any]) -> dict[str, Any]:
        """Every kind of thing in and out."""
        inner = self.a(batch, scale=(factor, shift))
        left = Result(self.b(inner["hidden"].rows))
        return {
            "left": left,
            "right": (flags, left.rows.sum(1)),
            "choice": left.rows.argmax(1),
            "nothing": batch["nothing"],
            "factor": factor,
        }


class Inner(nn.Module):
    """Structures between placed modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, batch: dict[str, Any], scale: tuple[float, Tensor]) -> dict[str, Any]:
        """The rows, scaled and shifted."""
        return {"hidden": Result(self.linear(batch["x"]) * self.weight * scale[0] + scale[1]), "batch": batch}


class Choosy(nn.Module):
    """Takes another way for some batches. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Decide by the sum."""
        x = self.a(x)
        if x.sum() > 0:
            x = self.b(x)
        return self.c(x)  # type: ignore[no-any-return]


class Between(nn.Module):
    """Two layers with a function in between. Input (rows, 8)."""

    def __init__(self, function: Callable[..., Any], **members: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, x: Tensor, *more: Any) -> Any:
        """First layer, function, second layer."""
        return self.b(self.function(self, self.a(x), *more))


class Applies(nn.Module):
    """Takes a function along. Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return function(self.b(torch.tanh(self.a(x)))) + x
