"""Forwards that run again in a backward: rematerialized ones, checkpointed ones, those of a gradient of a gradient.

User code may have changed by then what the forward depends on besides its inputs. Results are those of one device.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import UnsupportedError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.runtime.engine.surroundings import Surroundings
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.testing.cut_models import Applies

MakePair = Callable[..., Any]
ROUNDING = 1e-12
SCALES = {"factor": 1.0}
FACTOR = 1.0
KINDS = ["attribute", "object", "slots", "mapping", "list", "class", "global", "content of a global", "mode"]


def rows(count: int = 16) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Slots:
    """A configuration without a dictionary."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


class Scaled(nn.Module):
    """Multiplies by everything that user code may set. Shape (rows, 8)."""

    of_class = 1.0

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if kind == "mode" else nn.Identity()
        self.factor, self.settings, self.slots = 1.0, SimpleNamespace(factor=1.0), Slots()
        self.scales, self.factors, self.center = {"factor": 1.0}, [1.0], torch.zeros(8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor * self.settings.factor * self.slots.factor * self.scales["factor"] * sum(self.factors)
        h = torch.tanh(self.a(x) * factor * self.of_class * FACTOR * SCALES["factor"] - self.center.to(x.device))
        return self.b(self.norm(h)) + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{"rematerialize": True}, {}], ids=["rematerialize", ""])
def test_functions_that_a_region_is_given_are_those_of_the_call(pair: MakePair, options: dict[str, Any]) -> None:
    both = pair(Applies().double(), **options)

    def loss(model: nn.Module) -> Tensor:
        x, scales = rows(), [1.0]
        for number in range(3):
            of_loop = lambda scales, z: torch.sin(z * (number + 1)) * scales[0]  # noqa: E731, B023
            x = model(x, functools.partial(of_loop, scales))
            scales[0] += 1.0
        return x.pow(2).mean()

    for _ in range(3):
        both.step(loss)
        assert both.difference < ROUNDING
    assert both.calls


class Counting(nn.Module):
    """Has a counter that others move on, and one that it looks at itself. Shape (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * self.scale.to(x.device)  # type: ignore[no-any-return]


def test_a_counter_of_steps_may_move_on_before_the_backward(pair: MakePair) -> None:
    both = pair(Counting().double(), rematerialize=True)

    def loss(model: Any) -> Tensor:
        result = model(rows()).pow(2).mean()
        model.steps += 1
        return result  # type: ignore[no-any-return]

    for _ in range(3):
        both.step(loss)
        assert both.difference < ROUNDING
    assert both.calls
    result = both.model(rows()).pow(2).mean()
    both.model.scale += 1
    with pytest.raises(RuntimeError, match="an input, parameter or buffer of Counting was changed in place after the"):
        result.backward()


@contextmanager
def changed(kind: str, model: nn.Module) -> Iterator[None]:
    """Within the block something is set in all `Scaled` of a model."""
    global FACTOR
    parts: list[Any] = [part for part in model.modules() if isinstance(part, Scaled)]

    def put(value: float) -> None:
        global FACTOR
        for part in parts:
            if kind == "attribute":
                part.factor = value
            elif kind == "object":
                part.settings.factor = value
            elif kind == "slots":
                part.slots.factor = value
            elif kind == "mapping":
                part.scales["factor"] = value
            elif kind == "list":
                part.factors[:] = [1.0] * int(value)
        if kind == "class":
            Scaled.of_class = value
        elif kind == "global":
            FACTOR = value
        elif kind == "content of a global":
            SCALES["factor"] = value
        elif kind == "mode":
            model.train(value == 1.0)

    put(3.0)
    try:
        yield
    finally:
        put(1.0)


def buffers_are_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_differentiated_again_is_that_of_the_call(
    kind: str, rematerialize: bool, pair: MakePair
) -> None:
    both = pair(Scaled(kind).double(), rematerialize=rematerialize)

    def penalty(model: nn.Module) -> Tensor:
        x = rows().requires_grad_()
        with changed(kind, model):
            y = model(x)
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).pow(2).mean() + y.mean()

    for _ in range(2):
        both.step(penalty)
        assert both.difference <= ROUNDING
        assert buffers_are_equal(both.model, both.alone)
    assert both.engine.cut_calls == 1  # then it is known
    assert both.model.settings.factor == both.model.slots.factor == Scaled.of_class == FACTOR == 1.0
    assert both.model.training


@pytest.mark.parametrize("kind", KINDS)
def test_rematerialization_finds_what_is_inside_as_it_was(kind: str, pair: MakePair) -> None:
    both = pair(Scaled(kind).double(), rematerialize=True)

    def loss(model: nn.Module) -> Tensor:
        with changed(kind, model):
            y: Tensor = model(rows())
        return y.pow(2).mean()

    for _ in range(2):
        both.step(loss)
        assert both.difference <= ROUNDING
        assert both.model.factors == [1.0]
        assert both.model.scales == SCALES == {"factor": 1.0}
    assert both.engine.cut_calls == 2


def test_a_tensor_or_parameter_that_is_another_one_by_then_is_an_error(pair: MakePair) -> None:
    both = pair(Scaled().double(), rematerialize=True)
    y = both.model(rows())
    both.model.center.add_(1)
    with pytest.raises(RuntimeError, match="the tensor 'center' of Scaled was changed in place after the call"):
        y.sum().backward()

    both = pair(Scaled().double())
    x = rows().requires_grad_()
    y = both.model(x)
    with torch.no_grad():
        both.model.a.weight.mul_(2)
    with pytest.raises(RuntimeError, match="an input, parameter or buffer of Scaled was changed in place"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_module_that_has_its_last_output_keeps_no_earlier_graphs(pair: MakePair) -> None:
    model = pair(Scaled().double()).model
    seen = []
    for _ in range(4):
        model.last = model(rows())
        seen.append(weakref.ref(model.last))
    gc.collect()
    assert [ref() is None for ref in seen] == [True, True, True, False]


# Activation checkpointing


class Stack(nn.Module):
    """Three blocks that share their settings. Shape (rows, 8)."""

    def __init__(self, block: Callable[[], nn.Module] = Scaled) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        for each in self.blocks:
            each.settings = self.blocks[0].settings  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@contextmanager
def checkpointed(model: nn.Module, micro_batches: int) -> Iterator[PlacedModel]:
    """The model on three devices, each block run again in the backward."""
    names = tuple({type(block).__name__ for block in model.blocks})  # type: ignore[union-attr]
    problem = Problem(graph=find_units(model, names), inventory=resolve_devices("cpu@speed=1,cpu@speed=1,cpu@speed=1"))
    plan = make_plan(get_policy("round_robin"), problem)
    plan = plan.with_checkpointing(list(plan.device_of))
    found = PlacedModel(model, plan, Pipelining(hang_timeout_s=30.0, micro_batches=micro_batches))
    found.place()
    try:
        yield found
    finally:
        found.release(torch.device("cpu"))


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_find_what_is_inside_as_it_was(kind: str, micro_batches: int) -> None:
    alone = Stack(lambda: Scaled(kind)).double()
    model = copy.deepcopy(alone)
    with checkpointed(model, micro_batches) as placed:
        for _ in range(2):
            for each in (alone, model):
                each.zero_grad()
                with changed(kind, each):
                    y = each(rows())
                y.pow(2).mean().backward()
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                assert p.grad is None or q.grad is None or float((p.grad - q.grad).abs().max()) <= ROUNDING
        assert buffers_are_equal(model, alone)
        assert placed.engine is None or placed.engine.cut_calls == 2
        assert model.blocks[1].settings.factor == 1.0  # type: ignore[union-attr]


class Counts(Scaled):
    """Counts its calls, and adds to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.norms, self.log = 0, list[Tensor](), {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log["calls"] += 1
        self.norms.append(x.detach().norm())
        return super().forward(x)


def test_checkpointed_blocks_count_once() -> None:
    model = Stack(Counts).double()
    with checkpointed(model, 1):
        for _ in range(2):
            model(rows()).sum().backward()
    assert all((each.calls, each.log, len(each.norms)) == (2, {"calls": 2}, 2) for each in model.blocks)


def test_a_tensor_or_buffer_of_a_checkpointed_block_that_is_another_one_by_then_is_an_error() -> None:
    model = Stack(lambda: Scaled("mode")).double()
    with checkpointed(model, 1):
        y = model(rows())
        model.blocks[1].center.add_(1)  # type: ignore[union-attr, operator]
        with pytest.raises(RuntimeError, match=r"a tensor of blocks\.1 was changed after the call"):
            y.sum().backward()
        model.eval()
        y = model(rows())
        model.blocks[2].norm.running_mean.add_(1)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=r"a buffer of blocks\.2 was changed after the call"):
            y.sum().backward()


def test_a_block_that_changes_a_tensor_in_an_attribute_is_refused() -> None:
    class Moves(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.center.add_(y.detach().mean(0))
            return y

    model = Stack(Moves).double()
    with (
        checkpointed(model, 1),
        pytest.raises(UnsupportedError, match=r"Moves in it changes a tensor in place \(center"),
    ):
        model(rows())


def test_what_modules_share_is_as_it_was_until_the_last_of_several_is_done() -> None:
    model: Any = Scaled()
    with changed("object", model), changed("mapping", model):
        first, second = Surroundings([model]), Surroundings([model])
    model.scales["more"] = 2
    another = Surroundings([model])
    one, other = first.in_effect(), second.in_effect()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert model.settings.factor == 3.0
    assert model.scales == {"factor": 3.0}
    with pytest.raises(RuntimeError, match="need other values of the same"), another.in_effect():
        pass
    assert model.settings.factor == 3.0
    other.__exit__(None, None, None)
    assert model.settings.factor == 1.0
    assert model.scales == {"factor": 1.0, "more": 2}


def test_an_attribute_that_a_class_gets_later_is_gone_for_the_second_run() -> None:
    class Later(Scaled):
        pass

    surroundings = Surroundings([Later()])
    Later.of_class = 2.0
    with surroundings.in_effect():
        assert Later.of_class == 1.0
    assert Later.of_class == 2.0
