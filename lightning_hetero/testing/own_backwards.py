"""Functions of autograd whose backward calls modules, as adjoint methods and reversible layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_STEPS = 3


class _Adjoint(torch.autograd.Function):
    """Euler's method, with a continuous adjoint (Chen et al., Neural Ordinary Differential Equations, NeurIPS 2018)."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, z: Tensor, *parameters: Tensor) -> Tensor:
        ctx.field = field
        with torch.no_grad():
            for _ in range(_STEPS):
                z = z + field(z) / _STEPS
        ctx.save_for_backward(z, *parameters)
        return z

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> Any:
        z, *parameters = ctx.saved_tensors
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        for _ in range(_STEPS):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                change = ctx.field(z)
                of_z, *found = torch.autograd.grad(change, [z, *parameters], adjoint, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient / _STEPS
            z, adjoint = (z - change / _STEPS).detach(), adjoint + of_z / _STEPS
        return None, adjoint, *totals


class _Reversed(torch.autograd.Function):
    """Accumulates into parameters itself, as `torch.utils.checkpoint` does when it is reentrant."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(x + ctx.module(x), gradient)
        return None, x.grad


class Field(nn.Module):
    """What moves a state. Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, z: Tensor) -> Tensor:  # noqa: D102
        return self.net(z)  # type: ignore[no-any-return]


class Integrates(nn.Module):
    """Solves an equation; gradients come from the adjoint one."""

    def __init__(self) -> None:
        super().__init__()
        self.field = Field()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return _Adjoint.apply(self.field, x, *self.field.parameters())  # type: ignore[no-any-return, no-untyped-call]


class Reverses(Integrates):
    """Runs its part again in the backward, which adds to `grad` of parameters itself."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return _Reversed.apply(self.field, x)  # type: ignore[no-any-return, no-untyped-call]


class _Equilibrium(torch.autograd.Function):
    """Keeps a graph of its forward for its backward, and goes through it more than once."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = torch.tanh(field(ctx.x) * 0.1) + ctx.x
            ctx.parameters = parameters
        return ctx.y.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        for _ in range(_STEPS):
            (change,) = torch.autograd.grad(ctx.y, ctx.x, gradient, retain_graph=True)
            gradient = gradient + 0.1 * change
        found = torch.autograd.grad(ctx.y, [ctx.x, *ctx.parameters], gradient, retain_graph=True)
        return None, *found


class Equilibrium(Integrates):
    """An implicit layer, in small."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return _Equilibrium.apply(self.field, x, *self.field.parameters())  # type: ignore[no-any-return, no-untyped-call]


class RunsAgain(Integrates):
    """Checkpoints its part."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return checkpoint(self.field, x, use_reentrant=False)  # type: ignore[no-any-return]
