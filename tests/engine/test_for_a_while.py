"""What the forward of a region changes for a while, and other micro-batches would see: such regions run whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_hetero.testing.naps import late
from lightning_hetero.testing.rows import squares

MakePair = Callable[..., Any]
ROUNDING = 1e-12
SCALE = 1.0


class Settings:
    """For all layers."""

    scale = 1.0


class Scaled(nn.Module):
    """Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.naps = late

    def forward(self, x: Tensor) -> Tensor:
        x = self.naps(self.linear(x))
        return torch.tanh(x * SCALE * Settings.scale * torch.ones(()).mul(1 / 3).to(x.dtype))


class Layers(nn.Module):
    """Runs two of them in another way than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Scaled(), Scaled(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.between(self.first(x)))  # type: ignore[no-any-return]

    def between(self, x: Tensor) -> Tensor:
        return self.second(x)  # type: ignore[no-any-return]


class OfClass(Layers):
    def between(self, x: Tensor) -> Tensor:
        Settings.scale = 3.0
        x = self.second(x)
        Settings.scale = 1.0
        return x


class OfModule(Layers):
    def between(self, x: Tensor) -> Tensor:
        global SCALE
        SCALE = 3.0
        x = self.second(x)
        SCALE = 1.0
        return x


class OtherDtype(Layers):
    def between(self, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
        x = self.second(x)
        torch.set_default_dtype(before)
        return x


class Tangents(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.second.naps = torch.clone  # functions of autograd do not go with transforms

    def between(self, x: Tensor) -> Tensor:
        value, tangent = torch.func.jvp(self.second, (x,), (torch.ones_like(x),))
        return value + tangent


class TangentsInside(Layers):
    """A part that is one unit does so by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Inside()  # type: ignore[assignment]


class Inside(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias).tanh()

        value, tangent = torch.func.jvp(layer, (late(x),), (torch.ones_like(x),))
        return value + late(tangent)


class Ensemble(Tangents):
    """Maps a part over two sets of weights."""

    def between(self, x: Tensor) -> Tensor:
        weights = {name: torch.stack([each, 2 * each]) for name, each in self.second.named_parameters()}

        def of_one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.second, weights, (x,))  # type: ignore[no-any-return]

        return torch.func.vmap(of_one, in_dims=(0, None))(weights, x).mean(0)


class OtherWeights(Layers):
    def between(self, x: Tensor) -> Tensor:
        weights = {name: 2 * each.detach() for name, each in self.second.named_parameters()}
        return torch.func.functional_call(self.second, weights, (x,)) + self.second(x)  # type: ignore[no-any-return]


class OtherParts(Layers):
    def between(self, x: Tensor) -> Tensor:
        self.second.linear, self.third.linear = self.third.linear, self.second.linear
        x = self.second(x)
        self.second.linear, self.third.linear = self.third.linear, self.second.linear
        return x


class OtherData(Layers):
    def between(self, x: Tensor) -> Tensor:
        weight, before = self.second.linear.weight, self.second.linear.weight.data
        weight.data = 2 * before
        x = self.second(x)
        weight.data = before
        return x


class OtherBuffer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.second.register_buffer("scale", torch.ones(8))
        self.second.naps = self.scaled

    def scaled(self, x: Tensor) -> Tensor:
        return late(x * self.second.scale)

    def between(self, x: Tensor) -> Tensor:
        before, self.second.scale = self.second.scale, 2 * self.second.scale
        x = self.second(x)
        self.second.scale = before
        return x


class SetsWhileItRuns(Layers):
    """A part tells what it calls by a class, and the others hear it."""

    def __init__(self) -> None:
        super().__init__()
        self.second.naps = self.tells

    def tells(self, x: Tensor) -> Tensor:
        Settings.scale = 3.0
        x = late(late(x * Settings.scale))
        Settings.scale = 1.0
        return x


class Cached(Layers):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.second.linear)

    def between(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.second(self.second(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OfClass, "Settings.scale is set"),
        (OfModule, "the global 'SCALE' is set"),
        (OtherDtype, "sets the default dtype of torch for a while"),
        (Tangents, "differentiates in forward mode for a while"),
        (TangentsInside, "differentiates in forward mode for a while"),
        (OtherWeights, "second.linear._parameters is changed for a while"),
        (Ensemble, "second.linear._parameters is changed for a while"),
        (OtherParts, "second._modules is changed for a while"),
        (OtherData, "the data of second.linear.weight are exchanged for a while"),
        (OtherBuffer, "the buffer second.scale is changed, and not by the forward of its module"),
        (SetsWhileItRuns, "Settings.scale is set"),
        (Cached, "keeps parametrizations cached for a while"),
    ],
)
def test_it_runs_whole(pair: MakePair, kind: type[Layers], reason: str) -> None:
    torch.manual_seed(0)
    both = pair(kind().double(), on="cpu@speed=1,cpu@speed=1,cpu@speed=1")
    for _ in range(4):
        both.step(squares)
        assert both.difference < ROUNDING
    assert any(reason in each for each in both.engine.reasons), both.engine.reasons
    assert both.calls == 0


def test_what_is_left_as_it_is_does_no_harm(pair: MakePair) -> None:
    both = pair(Layers().double())
    for _ in range(3):
        both.step(squares)
        assert both.difference < ROUNDING
    assert both.calls


class _Noisy(torch.autograd.Function):
    """Adds noise to gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.randn_like(gradient)


class Noisy(Layers):
    def between(self, x: Tensor) -> Tensor:
        return self.second(_Noisy.apply(x))  # type: ignore[no-any-return, no-untyped-call]


class NoisyInside(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.second.naps = _Noisy.apply


class PythonSeeded(Layers):
    def between(self, x: Tensor) -> Tensor:
        before = random.getstate()
        random.seed(len(self._modules))
        x = x * random.random()
        x = self.second(x) * random.random()
        random.setstate(before)
        return x


class NumpySeeded(Layers):
    def between(self, x: Tensor) -> Tensor:
        before = np.random.get_state()
        np.random.seed(3)
        x = x * float(np.random.rand())
        x = self.second(x) * float(np.random.rand())
        np.random.set_state(before)
        return x


class UsesGlobal(Layers):
    def between(self, x: Tensor) -> Tensor:
        return self.second(COUNTER(x))  # type: ignore[no-any-return]


class Counter(nn.Module):
    """Averages all that it sees, in order."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean.to(x.device) + x.detach().mean()
        return x * (1 + self.mean)


COUNTER = Counter()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Noisy, "its backward draws random numbers"),
        (NoisyInside, "its backward draws random numbers"),
        (PythonSeeded, "its code sets random numbers of Python or NumPy back"),
        (NumpySeeded, "its code sets random numbers of Python or NumPy back"),
        (UsesGlobal, "the buffer 'mean' of COUNTER"),
    ],
)
def test_what_looks_as_if_nothing_had_happened(pair: MakePair, kind: type[Layers], reason: str) -> None:
    torch.manual_seed(0)
    both = pair(kind().double())

    def gradients(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        COUNTER.mean = torch.zeros((), dtype=torch.float64)
        found = []
        for _ in range(3):
            model.zero_grad()
            squares(model).backward()
            found += [each.grad.cpu().clone() for each in model.parameters() if each.grad is not None]
        return found

    gradients(both.model)
    for found, expected in zip(gradients(both.model), gradients(both.alone), strict=True):
        assert kind in (Noisy, NoisyInside) or torch.allclose(found, expected, rtol=0, atol=ROUNDING)
    for found, again in zip(gradients(both.model), gradients(both.model), strict=True):
        assert torch.equal(found, again)
    assert any(reason in each for each in both.engine.reasons), both.engine.reasons
