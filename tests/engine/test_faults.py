"""Failures in lanes and workers reach the user as they are, stop everything else, and leave an engine that works."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.errors import HangError
from lightning_hetero.runtime import frames
from lightning_hetero.testing.cut_models import Between
from lightning_hetero.testing.models import MLP

EXACT = 1e-12


class MyError(Exception):
    """What user code raises."""


class Bad(torch.autograd.Function):
    """Fails in forward or backward for one row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trouble: Trouble) -> Tensor:
        ctx.trouble = trouble
        ctx.bad = trouble.is_in(x)
        if trouble.place == "forward" and ctx.bad:
            trouble.happen()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.trouble.place == "backward" and ctx.bad:
            ctx.trouble.happen()
        return gradient, None


class Trouble(nn.Module):
    """Passes its input on, until it is told to fail for a batch that has a certain row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        # In a list, because an attribute that changes is a reason for another trial.
        self.orders: list[Any] = ["", lambda: None]

    @property
    def place(self) -> str:
        return self.orders[0]  # type: ignore[no-any-return]

    @place.setter
    def place(self, place: str) -> None:
        self.orders[0] = place

    @property
    def happen(self) -> Callable[[], Any]:
        return self.orders[1]  # type: ignore[no-any-return]

    @happen.setter
    def happen(self, happen: Callable[[], Any]) -> None:
        self.orders[1] = happen

    def is_in(self, x: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return bool((x.detach().cpu().abs().amax(1) > 50).any())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Bad.apply(x * self.weight, self)
        return result


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Trouble(), nn.Linear(8, 4)).double()


def rows(bad: int | None = None) -> Tensor:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if bad is not None:
        x[bad] = 1000.0
    return x


def raise_error() -> None:
    raise MyError("from user code")


def raise_exit() -> None:
    raise SystemExit(7)


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("bad", [0, 7])
def test_an_exception_reaches_the_user_with_type_traceback_and_place(pair: Any, place: str, bad: int) -> None:
    both = pair(make())
    both.step(lambda model: model(rows()).pow(2).mean())
    trouble = both.model[1]
    trouble.place, trouble.happen = place, raise_error
    both.model.zero_grad()
    with pytest.raises(MyError, match="from user code") as caught:
        both.model(rows(bad)).pow(2).mean().backward()
    assert "raise_error" in [entry.name for entry in caught.traceback]
    (note,) = [note for note in caught.value.__notes__ if "micro-batch" in note]
    assert note == f"micro-batch {bad // 3} of 4 in Sequential"
    (where,) = [note for note in caught.value.__notes__ if " of 1" in note]
    assert re.fullmatch(rf"{place} of 1 on \S+", where)
    assert all(p.grad is None for p in both.model.parameters())
    trouble.place = ""
    for _ in range(2):
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT


def test_one_of_several_failures_is_raised_with_its_own_place(pair: Any) -> None:
    both = pair(make())
    both.model(rows())
    both.model[1].place, both.model[1].happen = "forward", raise_error
    with pytest.raises(MyError) as caught:
        both.model(torch.full((12, 8), 1000.0, dtype=torch.float64))
    (note,) = [note for note in caught.value.__notes__ if "micro-batch" in note]
    assert re.fullmatch(r"micro-batch [0-3] of 4 in Sequential", note)


def test_base_exceptions_too(pair: Any) -> None:
    both = pair(make())
    both.model(rows())
    both.model[1].place, both.model[1].happen = "forward", raise_exit
    with pytest.raises(SystemExit, match="7"):
        both.model(rows(5))
    both.model[1].place = ""
    both.step(lambda model: model(rows()).pow(2).mean())
    assert both.difference < EXACT


def test_user_code_may_catch_what_a_part_raises(pair: Any) -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.trouble, self.b = nn.Linear(8, 8), Trouble(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            try:
                x = self.trouble(x)
            except MyError:
                x = x * 0
            return self.b(x)  # type: ignore[no-any-return]

    both = pair(Careful().double())
    both.model(rows())
    for model in (both.model, both.alone):
        model.trouble.place, model.trouble.happen = "forward", raise_error
    ours, theirs = both.model(rows(4)), both.alone(rows(4))
    rest = [row for row in range(12) if row // 3 != 1]  # one device has one batch to give up, not a fourth of it
    assert torch.allclose(ours.cpu()[3:6], both.alone.b.bias.expand(3, 4))
    assert torch.equal(theirs, both.alone.b.bias.expand(12, 4))
    assert len(rest) == 9


def settle(model: nn.Module) -> None:
    """Wait for what torch's threads of accelerators still add to gradients when a backward has raised already."""
    for device in {parameter.device for parameter in model.parameters()}:
        torch.ones((), device=device, requires_grad=True).mul(1.0).backward()


def test_an_error_elsewhere_in_the_users_graph(pair: Any) -> None:
    both = pair(MLP().double())

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise MyError("elsewhere")

    x = rows().requires_grad_()
    for _ in range(2):
        with pytest.raises(MyError, match="elsewhere"):
            both.model(Fails.apply(x)).sum().backward()
        settle(both.model)
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT


def test_hooks_of_parameters_are_back_after_a_failure(pair: Any) -> None:
    both = pair(make())
    both.model(rows())
    calls: list[int] = []
    both.model[0].weight.register_hook(lambda gradient: calls.append(1))
    both.model[1].place, both.model[1].happen = "backward", raise_error
    with pytest.raises(MyError):
        both.model(rows(0)).sum().backward()
    assert calls == []
    both.model[1].place = ""
    both.model(rows()).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_an_interrupt_stops_the_lanes(pair: Any, place: str) -> None:
    both = pair(make())
    both.model(rows())
    trouble = both.model[1]
    trouble.place, trouble.happen = place, lambda: time.sleep(0.5)
    before = threading.active_count()
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            both.model(torch.full((12, 8), 1000.0, dtype=torch.float64)).sum().backward()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, usual)
    trouble.place = ""
    assert threading.active_count() == before
    frames.cut_to(0)  # what a strategy does after every step
    both.step(lambda model: model(rows()).pow(2).mean())
    assert both.difference < EXACT


def test_a_stuck_step_ends_with_an_error_that_says_who_is_stuck(pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    both = pair(make(), hang_timeout_s=0.5)
    both.model(rows())
    stuck = threading.Event()
    both.model[1].place, both.model[1].happen = "forward", stuck.wait
    threading.Timer(0.9, stuck.set).start()
    with pytest.raises(HangError, match=r"Sequential has not ended after 0.5 s\. \S+ runs F of 1 for micro-batch 1\."):
        both.model(rows(4))
    assert "Thread" in capsys.readouterr().err


def test_a_failure_in_a_trial_is_the_users_error(pair: Any) -> None:
    both = pair(Between(lambda model, x: raise_error()))
    with pytest.raises(MyError, match="from user code"):
        both.model(torch.randn(4, 8))


def test_out_of_memory_keeps_its_type(pair: Any) -> None:
    def oom() -> None:
        raise torch.OutOfMemoryError("dev:0 is out of memory")

    both = pair(make())
    both.model(rows())
    both.model[1].place, both.model[1].happen = "forward", oom
    with pytest.raises(torch.OutOfMemoryError, match="dev:0 is out of memory"):
        both.model(rows(4))
