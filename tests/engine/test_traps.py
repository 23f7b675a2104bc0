"""What silently corrupts training when a call is cut, each with its own test."""

from __future__ import annotations

import contextvars
import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.runtime.engine.cut import UnitCall
from lightning_hetero.runtime.engine.faults import Countdown
from lightning_hetero.runtime.engine.region import RegionCall
from lightning_hetero.runtime.engine.worker import Future, Worker
from lightning_hetero.testing.cut_models import Between, Everything, Twice
from lightning_hetero.testing.models import MLP, Attention

EXACT = 1e-12


def rows(count: int = 10, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_backward_returns_when_all_gradients_are_there_even_if_inputs_need_none(pair: Any) -> None:
    both = pair(MLP().double())
    for _ in range(20):
        both.step(lambda model: model(rows()).pow(2).mean())
        found = [p.grad.clone() for p in both.model.parameters()]
        assert both.difference < EXACT
        assert all(torch.equal(a, p.grad) for a, p in zip(found, both.model.parameters(), strict=True))


def test_hooks_of_a_parameter_see_its_whole_gradient_once(pair: Any) -> None:
    both = pair(MLP().double())
    calls: dict[str, list[float]] = {"hook": [], "after": []}

    def halve(gradient: Tensor) -> Tensor:
        calls["hook"].append(float(gradient.abs().sum()))
        return gradient * 0.5

    both.alone.second.weight.register_hook(lambda gradient: gradient * 0.5)
    both.model.second.weight.register_hook(halve)
    both.model.second.weight.register_post_accumulate_grad_hook(lambda p: calls["after"].append(0.0))
    for _ in range(2):
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT
    assert len(calls["hook"]) == len(calls["after"]) == 2


def test_one_gradient_for_two_parameters_is_not_added_to_twice(pair: Any) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.p + self.q + 1)

    both = pair(Between(lambda model, x: model.sum(x), sum=Sum()).double())
    both.step(lambda model: model(rows()).pow(2).mean())
    assert both.difference < EXACT
    assert both.calls == 1


@pytest.mark.parametrize("first", [10, 16])
def test_a_table_with_as_many_rows_as_the_batch_is_not_cut(pair: Any, first: int) -> None:
    table = rows(10)
    both = pair(Between(lambda model, x, table: F.softmax(x @ table.T, -1) @ table).double())
    for count in (first, 10, 7):
        both.step(lambda model, count=count: model(rows(count), table).pow(2).mean())
        assert both.difference < EXACT
    assert both.calls == 3


def test_rows_that_depend_on_each_other_are_not_cut(pair: Any) -> None:
    both = pair(Between(lambda model, x: x - x.mean(0)).double())
    both.step(lambda model: model(rows()).pow(2).mean())
    assert both.difference == 0.0
    assert both.engine.reasons == ["Between is not cut into micro-batches, because its rows depend on each other"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_a_region(pair: Any, reentrant: bool) -> None:
    both = pair(MLP().double())
    x = rows().requires_grad_()
    both.step(lambda model: checkpoint(model, x, use_reentrant=reentrant).pow(2).mean())
    assert both.difference < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_a_region_with_dropout(pair: Any, reentrant: bool) -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(self.a(x)))  # type: ignore[no-any-return]

    both = pair(Noted().double())
    x = rows().requires_grad_()
    torch.manual_seed(5)
    y = checkpoint(both.model, x, use_reentrant=reentrant)
    y.sum().backward()
    # The gradient of the last bias counts rows; that of the last weight is what came through dropout, as seen in y.
    through = torch.linalg.lstsq(
        both.model.b.weight.cpu(), (y - both.model.b.bias.to(y.device)).detach().cpu().T
    ).solution.T
    assert torch.allclose(both.model.b.weight.grad.cpu(), through.sum(0).expand(8, 8), rtol=0, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside_a_region(pair: Any, reentrant: bool) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: torch.relu(self.b(torch.relu(self.a(x)))), x, use_reentrant=reentrant)
            return self.c(x)  # type: ignore[no-any-return]

    both = pair(Inside().double())
    for _ in range(3):
        both.step(lambda model: model(rows().requires_grad_()).pow(2).mean())
        assert both.difference < EXACT


def test_two_outputs_may_be_differentiated_one_after_the_other(pair: Any) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    both = pair(Heads().double())
    for model in (both.model, both.alone):
        first, second = model(rows())
        first.pow(2).mean().backward()
        second.pow(2).mean().backward()
    assert both.difference < EXACT
    assert both.calls == 1


def test_a_region_that_is_called_twice_and_on_its_own_output(pair: Any) -> None:
    both = pair(Twice().double())
    both.step(lambda model: model(model(rows())).pow(2).mean() + model(rows(5)).sum())
    assert both.difference < EXACT
    assert both.calls == 3


def test_a_tensor_that_is_no_input_keeps_its_gradient(pair: Any) -> None:
    class Captures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.hyper = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
            self.scale: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale[0])  # type: ignore[no-any-return]

    both = pair(Captures().double())

    def loss(model: nn.Module) -> Tensor:
        model.scale[:] = [model.hyper(torch.ones(8, dtype=torch.float64))]
        value: Tensor = model(rows()).pow(2).mean()
        return value

    for _ in range(2):
        both.step(loss)
        assert both.difference < EXACT
    both.model.scale.clear()
    assert "a tensor with a graph that is not one of its inputs" in both.engine.reasons[0]


def test_a_gradient_that_is_differentiated_again(pair: Any) -> None:
    both = pair(MLP().double())

    def penalty(model: nn.Module) -> Tensor:
        x = rows().requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).pow(2).mean() + y.mean()

    for _ in range(2):
        both.step(penalty)
        assert both.difference < EXACT
    assert both.engine.reasons == [
        "MLP is not cut into micro-batches, because its gradient is differentiated again (create_graph=True)"
    ]


def test_gradients_that_are_asked_for_are_not_accumulated(pair: Any) -> None:
    both = pair(MLP().double())
    found = []
    for model in (both.model, both.alone):
        x = rows().requires_grad_()
        (of_x,) = torch.autograd.grad(model(x).pow(2).mean(), x)
        of_parameters = torch.autograd.grad(model(x).pow(2).mean(), list(model.parameters()))
        assert all(p.grad is None for p in model.parameters())
        assert x.grad is None
        model(x).pow(2).mean().backward(inputs=[model.second.weight])
        assert model.first.weight.grad is None
        found.append([of_x, *of_parameters, model.second.weight.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=0, atol=EXACT)


def test_a_graph_that_is_retained_can_be_used_again_and_one_that_is_not_cannot(pair: Any) -> None:
    both = pair(MLP().double())
    for model in (both.model, both.alone):
        loss = model(rows()).pow(2).mean()
        loss.backward(retain_graph=True)
        loss.backward()
        before = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert both.difference < EXACT


def test_zero_grad_between_forward_and_backward(pair: Any) -> None:
    both = pair(MLP().double())
    for model in (both.model, both.alone):
        model(rows()).sum().backward()
        loss = model(rows()).pow(2).mean()
        model.zero_grad(set_to_none=False)
        loss.backward()
        model(rows(3)).pow(2).mean().backward()
    assert both.difference < EXACT


def test_outputs_belong_to_the_caller(pair: Any) -> None:
    both = pair(MLP().double())
    both.step(lambda model: model(rows()).mul_(2).add_(1).pow(2).mean())
    assert both.difference < EXACT


def test_transforms_of_torch_func_stay_in_their_thread(pair: Any) -> None:
    both = pair(MLP().double())
    names = [name for name, _ in both.alone.named_parameters()]
    found = []
    for model in (both.model, both.alone):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        slopes = torch.func.grad(lambda v, m=model: torch.func.functional_call(m, v, rows()).pow(2).mean())(values)
        found.append([slopes[name].cpu() for name in names])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
        assert theirs.abs().sum() > 0


def test_hooks_of_user_code_on_parts_see_whole_batches(pair: Any) -> None:
    both = pair(MLP().double())
    seen: list[int] = []
    handle = both.model.second.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    both.model(rows())
    assert seen == [10]
    assert "second has hooks of user code" in both.engine.reasons[0]
    handle.remove()
    both.model(rows())
    assert both.calls == 1


def test_hooks_of_user_code_on_the_region_see_whole_batches_once(pair: Any) -> None:
    both = pair(MLP().double())
    seen: list[int] = []
    both.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    both.model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    both.model(rows())
    assert seen == [10, 10]
    assert both.calls == 1


def test_hooks_registered_while_training_end_the_cutting(pair: Any) -> None:
    both = pair(MLP().double())
    both.model(rows())
    seen: list[int] = []
    both.model.second.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    both.model(rows())
    assert seen == [10]


def test_state_that_the_forward_keeps_is_kept_once_for_a_batch(pair: Any) -> None:
    def remember(model: Any, x: Tensor) -> Tensor:
        model.last = x.detach()
        model.history.append(len(x))
        model.steps.add_(1)
        return x

    model = Between(remember).double()
    model.history = []
    model.register_buffer("steps", torch.zeros(()))
    both = pair(model)
    both.step(lambda model: model(rows()).pow(2).mean())
    assert both.difference < EXACT
    assert both.model.history == [10]
    assert both.model.steps.item() == 1
    assert both.model.last.shape == (10, 8)
    assert "because its forward " in both.engine.reasons[0]


def test_a_trial_leaves_no_trace(pair: Any) -> None:
    both = pair(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4)).double())
    x = rows()
    torch.manual_seed(1)
    before = copy.deepcopy(both.model.state_dict())
    both.model.eval()
    state = torch.get_rng_state()
    both.model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not both.model.training
    both.model.train()
    both.model(x)  # batch statistics: whole, after a look at the modules
    assert all(p.grad is None for p in both.model.parameters())
    assert all(module.training for module in both.model.modules())
    after = both.model.state_dict()
    assert torch.equal(before["0.weight"].cpu(), after["0.weight"].cpu())
    assert int(after["2.num_batches_tracked"]) == 1


def test_a_tensor_that_escapes_from_a_cut_call_is_an_error_in_backward(pair: Any) -> None:
    escaped: list[Tensor] = []

    def leak(model: Any, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            escaped.append(x)
        return x

    both = pair(Between(leak).double())
    both.model(rows())
    with pytest.raises(RuntimeError, match=r"a tensor from inside a module, which was cut .* Set micro_batches=1"):
        escaped[0].sum().backward()


def test_modules_that_use_a_childs_weight_without_calling_the_child(pair: Any) -> None:
    both = pair(Attention().double())
    x = torch.randn(10, 5, 8, dtype=torch.float64)
    both.step(lambda model: model(x).pow(2).mean())
    assert both.difference < EXACT


def test_copies_and_pickles_are_ordinary_modules(pair: Any) -> None:
    both = pair(MLP().double(), on="cpu@speed=1,cpu@speed=1")
    both.model(rows())
    expected = both.alone(rows())
    for twin in (copy.deepcopy(both.model), pickle.loads(pickle.dumps(both.model))):
        calls = both.calls
        assert torch.equal(twin(rows()), expected)
        assert both.calls == calls


def test_after_the_release_nothing_is_left(pair: Any) -> None:
    both = pair(Everything().double())
    x = rows()
    both.model({"x": x, "nothing": None}, factor=1.0, shift=x[0], flags=[])
    assert any(thread.name.startswith("hetero-") for thread in threading.enumerate())
    both.placed.release(torch.device("cpu"))
    assert not any(thread.name.startswith("hetero-") for thread in threading.enumerate())
    for module in both.model.modules():
        assert "forward" not in module.__dict__
        assert "_compiled_call_impl" not in module.__dict__


@pytest.mark.parametrize("lag_s", [0.0, 0.2])
@pytest.mark.parametrize("backward", [True, False])
def test_a_call_does_not_outlive_its_output(
    pair: Any, backward: bool, lag_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by threads that take their time to get out of it when they have done their part."""
    both = pair(MLP().double())

    def lagging(thats_it: Callable[[Any], None]) -> Callable[[Any], None]:
        def lag(self: Any) -> None:
            thats_it(self)
            time.sleep(lag_s)

        return lag

    for owner, name in ((Countdown, "count_down"), (Future, "release")):
        monkeypatch.setattr(owner, name, lagging(getattr(owner, name)))

    def alive() -> set[int]:
        return {id(obj) for obj in gc.get_objects() if type(obj) in (RegionCall, UnitCall)}

    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(2):
            loss = both.model(rows()).pow(2).mean()
            if backward:
                loss.backward()
            del loss
        assert not alive() - before
    finally:
        gc.enable()


def test_compiled_parts_run_on_their_workers(pair: Any) -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
            self.b.compile(backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    both = pair(Compiled().double(), on="cpu@speed=1,cpu@speed=1")
    both.step(lambda model: model(rows()).pow(2).mean())
    assert both.difference < EXACT
    assert both.calls == 1


SCALE: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=0.0)


class Scaled(torch.autograd.Function):
    """A backward that looks at a context variable, as layers do that are told from outside how to round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * SCALE.get()


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Scaled.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return result


@pytest.mark.parametrize("devices", ["cpu@speed=1,cpu@speed=1,cpu@speed=1"], ids=["emulated"])
@pytest.mark.parametrize("by", ["lanes", "whoever is free", "devices"])
def test_context_variables_of_the_backward(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, by: str, devices: str
) -> None:
    """On the CPU, where the backward of one device runs in the thread of the user."""
    both = pair(nn.Sequential(*(ScaledLinear(8, 8).double() for _ in range(3))))
    batch = torch.randn(16, 8, dtype=torch.float64)
    if by == "devices":
        monkeypatch.setattr(Worker, "takes_help", False)

    def loss(model: nn.Module) -> Tensor:
        SCALE.set(1.0)
        result: Tensor = model(batch).pow(2).mean()
        SCALE.set(3.0)  # for the backward alone
        return result

    def step() -> None:
        for worker in both.engine.threads.workers.values():
            worker.task_s = 1e-5 if by == "lanes" else 0.1
        both.step(loss)

    contextvars.copy_context().run(lambda: [step() for _ in range(3)])
    assert both.calls == 3
    assert both.difference < 1e-12
