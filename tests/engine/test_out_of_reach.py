"""State that a region is given, or reaches by others: a trial leaves no trace in it. And second runs of user code."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.testing.naps import RunningMean, late
from lightning_hetero.testing.rows import rows, squares

MakePair = Callable[..., Any]
ROUNDING = 1e-12
another_file: Any = types.ModuleType("another_file")
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Again(nn.Module):
    """Checkpoints itself, or not; with dropout inside, or not. Shape (rows, 8)."""

    checkpoints = True

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(8, 8), p

    def body(self, x: Tensor) -> Tensor:
        x = late(self.linear(late(x)))
        if self.p:
            x = F.dropout(F.dropout(x, self.p), self.p)
        return torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpoints else self.body(x)


def test_numbers_that_are_drawn_after_parts_ran_again_are_those_of_one_device(pair: MakePair) -> None:
    both = pair(nn.Sequential(*(Again(0.0) for _ in range(3))).double(), on=EMULATED)

    def drawn(model: nn.Module) -> list[float]:
        torch.manual_seed(0)
        found = []
        for _ in range(6):
            squares(model).backward()
            found.append(float(torch.rand(())))
        return found

    expected = drawn(both.alone)
    for _ in range(3):
        assert drawn(both.model) == expected
    assert both.calls


@pytest.mark.parametrize("ps", [(0.3, 0.0, 0.3), (0.0, 0.3, 0.0), (0.3, 0.3, 0.3)])
def test_parts_that_run_again_have_the_masks_of_their_first_run(
    pair: MakePair, ps: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair(nn.Sequential(*map(Again, ps)).double(), on=EMULATED)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        both.model.zero_grad()
        squares(both.model).backward()
        return [parameter.grad.clone() for parameter in both.model.parameters()]

    gradients()  # a trial
    again = [gradients() for _ in range(4)]
    monkeypatch.setattr(Again, "checkpoints", False)
    expected = gradients()
    assert both.calls
    for found in again:
        assert all(map(torch.equal, found, expected))


class Asks(nn.Module):
    """Does what it is given. Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, does: Callable[[Tensor], Any]) -> Tensor:
        x = self.a(x)
        x = does(x) if isinstance(does, nn.Module) else (does(x), x)[1]
        return self.b(x)  # type: ignore[no-any-return]


class Tap:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def see(self, x: Tensor) -> None:
        self.seen.append(float(x.detach().pow(2).mean()))


@pytest.mark.parametrize("kind", ["function", "method", "append", "norm", "buffer"])
def test_what_a_region_is_given_has_no_trace_of_trials(pair: MakePair, kind: str) -> None:
    both = pair(Asks().double())
    taps, appended = [Tap(), Tap()], ([], [])  # type: ignore[var-annotated]
    norms = [nn.BatchNorm1d(8).double() for _ in range(2)]
    means = [RunningMean().double() for _ in range(2)]
    makes: dict[str, Callable[[int], Any]] = {
        "function": lambda index: lambda x: taps[index].seen.append(float(x.detach().pow(2).mean())),
        "method": lambda index: taps[index].see,
        "append": lambda index: appended[index].append,
        "norm": lambda index: norms[index],
        "buffer": lambda index: means[index],
    }
    for _ in range(3):
        both.step(lambda model: model(rows(), makes[kind](model is both.model)).pow(2).mean())
        assert both.difference <= ROUNDING
    assert len(taps[0].seen) == len(taps[1].seen) == 3 * (kind in ("function", "method"))
    assert taps[0].seen == pytest.approx(taps[1].seen, abs=ROUNDING)
    assert len(appended[0]) == len(appended[1]) == 3 * (kind == "append")
    for one, other in ((*norms,), (*means,)):
        for a, b in zip(one.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)


class Calls(nn.Module):
    """Calls what it has. Shape (rows, 8)."""

    does: Callable[[Tensor], Any]

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.does(x.detach())
        return self.b(x)  # type: ignore[no-any-return]


class Above(nn.Module):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def tell(self) -> Callable[[Tensor], None]:
        return lambda x: self.seen.append(x)


@pytest.mark.parametrize("kind", ["append", "variable"])
def test_what_callbacks_hide_has_no_trace_of_trials(pair: MakePair, kind: str) -> None:
    both, above = pair(Calls().double()), (Above(), Above())
    for model, keeps in zip((both.alone, both.model), above, strict=True):
        model.does = keeps.seen.append if kind == "append" else keeps.tell()
    for _ in range(3):
        both.step(squares)
        assert both.difference <= ROUNDING
    assert [len(keeps.seen) for keeps in above] == [3, 3]


class Counting(torch.autograd.Function):
    """Counts its calls."""

    forwards = backwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counting.forwards += 1
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Counting.backwards += 1
        return gradient * 2


class Counted(nn.Module):
    """Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Counting.apply(self.a(x)))  # type: ignore[no-any-return, no-untyped-call]


def test_functions_of_autograd_have_no_trace_of_trials(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair(Counted().double())
    for name in ("forwards", "backwards"):
        monkeypatch.setattr(Counting, name, 0)
    for _ in range(3):
        both.step(squares)
        assert both.difference <= ROUNDING
    assert (Counting.forwards, Counting.backwards) == (6, 6)


class InAnotherFile(nn.Module):
    """Counts in a class of a module of Python that it names. Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        another_file.Counts.calls += 1
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def test_classes_in_other_files_have_no_trace_of_trials(pair: MakePair) -> None:
    another_file.Counts = type("Counts", (), {"calls": 0, "__module__": "another_file"})
    both = pair(InAnotherFile().double())
    for _ in range(3):
        both.step(squares)
        assert both.difference <= ROUNDING
    assert another_file.Counts.calls == 6


def test_gradients_that_are_scaled_by_how_often_a_row_comes(pair: MakePair) -> None:
    both = pair(nn.Sequential(nn.Embedding(20, 8, scale_grad_by_freq=True), nn.Linear(8, 8), nn.Linear(8, 4)).double())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        tokens = torch.randint(20, (32,), generator=generator)
        both.step(lambda model, tokens=tokens: model(tokens).pow(2).mean())
        assert both.difference <= ROUNDING
    assert "scales gradients by how often the batch has a row" in both.engine.reasons[0]


def test_a_forward_without_gradients_draws_nothing_where_the_model_draws_nothing(pair: MakePair) -> None:
    both = pair(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).double(), micro_batches=1)
    before = torch.get_rng_state()
    with torch.no_grad():
        both.model(rows())
    assert torch.equal(torch.get_rng_state(), before)


class Towers(nn.Module):
    """Two outputs. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.one(h), self.other(h)


@pytest.mark.parametrize("kind", ["mask", "replace"])
def test_hooks_of_parameters_that_a_loss_does_not_reach_are_not_called(pair: MakePair, kind: str) -> None:
    both = pair(Towers().double())
    seen: dict[nn.Module, int] = {both.alone: 0, both.model: 0}

    def hook(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(gradient: Tensor) -> Tensor:
            seen[model] += 1
            return gradient * 0.5 if kind == "mask" else torch.ones(4, 8, dtype=torch.float64)

        return call

    handles = [model.other.weight.register_hook(hook(model)) for model in seen]  # type: ignore[union-attr]
    hooks = dict(both.model.other.weight._backward_hooks)
    for step in range(4):
        both.step(lambda model, step=step: sum(y.pow(2).mean() for y in model(rows())[: 1 + step % 2]))
        assert both.difference <= ROUNDING  # and None in the same places
        assert dict(both.model.other.weight._backward_hooks) == hooks
    assert both.calls
    assert seen[both.model] == seen[both.alone] == 2
    for handle in handles:
        handle.remove()
    assert not both.model.other.weight._backward_hooks
