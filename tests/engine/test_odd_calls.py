"""Unusual calls: what changes between calls, who else is at work, and what user code does with the results."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.cut_models import Between

EXACT = 1e-12
COUPLED = "its rows depend on each other"
ON_ACCELERATORS = pytest.mark.parametrize("devices", ["accelerator"], indirect=True)


def rows(count: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def square(model: nn.Module) -> Tensor:
    return model(rows()).pow(2).mean()  # type: ignore[no-any-return]


def centred(model: Any, x: Tensor, mode: Any = "rows") -> Tensor:
    return x - x.mean(0) if mode in ("batch", 1) or getattr(model, "mode", "") == "batch" else x


class Late(torch.autograd.Function):
    """Takes its time in the backward, and says so."""

    runs = threading.Event()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Late.runs.set()
        time.sleep(0.01)
        return gradient


# What changes between calls


@pytest.mark.parametrize("modes", [("rows", "batch", "rows"), (0, 1, 0)])
def test_an_argument_decides_whether_rows_are_coupled(pair: Any, modes: tuple[Any, ...]) -> None:
    both = pair(Between(centred).double())
    for mode in modes:
        both.step(lambda model, mode=mode: model(rows(), mode).pow(2).mean())
        assert both.relative_difference < EXACT
    assert both.calls == 2
    assert both.engine.reasons == [f"Between is not cut into micro-batches, because {COUPLED}"]


def test_an_attribute_decides_whether_rows_are_coupled(pair: Any) -> None:
    both = pair(Between(centred).double())
    for mode in ("rows", "batch", "rows"):
        both.model.mode = both.alone.mode = mode
        both.step(square)
        assert both.relative_difference < EXACT
    assert both.calls == 2


def test_numbers_that_change_at_every_call_do_not_mean_a_trial_at_every_call(pair: Any) -> None:
    calls = itertools.count()  # which is no state that a trial would see

    def counted(model: Any, x: Tensor, temperature: float) -> Tensor:
        if threading.current_thread() is threading.main_thread():  # lanes do not count
            next(calls)
        return x * temperature

    both = pair(Between(counted).double())
    for step in range(40):
        both.model.steps = step
        both.model(rows(), 1.0 + step)
    assert both.calls == 40
    assert next(calls) < 14 * 9  # eight trials, and one for the numbers that go on changing


@pytest.mark.parametrize("first", [1, 10])
def test_a_mask_may_have_one_row_or_one_for_each(pair: Any, first: int) -> None:
    both = pair(Between(lambda model, x, mask: x * mask).double())
    for count in (first, 11 - first, first):
        both.step(lambda model, count=count: model(rows(), rows(count, seed=4)).pow(2).mean())
        assert both.relative_difference < EXACT
    assert both.calls == 3


def test_a_python_value_that_depends_on_the_rows(pair: Any) -> None:
    class Counts(Between):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), len(x)

    both = pair(Counts(lambda model, x: x).double())
    for count in (2, 8):  # two rows are cut into parts of one row, which return the same
        assert both.model(rows(count))[1] == count
    assert both.calls == 0


def test_a_first_batch_without_rows_decides_nothing(pair: Any) -> None:
    both = pair(mlp())
    for count in (0, 1, 10):
        both.step(lambda model, count=count: model(rows(count)).sum())
        assert both.difference < EXACT
    assert both.calls == 1


def test_a_cache_that_is_filled_at_the_first_call_is_no_reason_for_ever(pair: Any) -> None:
    def rotated(model: Any, x: Tensor) -> Tensor:
        if model.table is None:
            model.table = torch.arange(8, dtype=x.dtype, device=x.device).cos()
        return x * model.table

    both = pair(Between(rotated, table=None).double())
    for _ in range(3):
        both.step(square)
        assert both.relative_difference < EXACT
    assert both.calls == 2


def test_a_module_that_is_exchanged(pair: Any) -> None:
    both = pair(Between(lambda model, x: model.inner(x), inner=nn.Identity()).double())
    both.step(square)
    for model in (both.model, both.alone):
        model.inner = nn.BatchNorm1d(8).double()
    both.step(square)
    assert both.relative_difference < EXACT
    assert torch.equal(both.model.inner.running_mean.cpu(), both.alone.inner.running_mean)
    assert both.calls == 1


def test_dropout_that_begins_later(pair: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.0), nn.Linear(64, 64)).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.eye(64))
            layer.bias.zero_()
    both = pair(model, rematerialize=True)
    for step in range(4):
        both.model[1].p = 0.2 * step
        x = torch.ones(16, 64, dtype=torch.float64, requires_grad=True)
        y = both.model(x)
        y.sum().backward()
        assert torch.equal(x.grad.cpu(), y.detach().cpu())  # the forward run again has dropped the same
    assert both.calls == 4


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_parts_that_come_later_see_whole_batches(pair: Any, kind: str) -> None:
    both = pair(mlp())
    loss: Callable[[nn.Module], Tensor] = lambda model: model(rows().requires_grad_()).pow(2).mean()  # noqa: E731
    both.step(loss)
    seen: list[int] = []
    getattr(both.model[0], kind)(lambda module, *gradients: seen.append(len(gradients[-1][0])))
    both.step(loss)
    assert seen == [10]


def test_hooks_on_all_modules_see_whole_batches(pair: Any) -> None:
    both = pair(mlp())
    both.model(rows())
    seen: set[int] = set()
    handle = torch_module.register_module_forward_hook(lambda module, args, output: seen.add(len(output)))
    try:
        both.model(rows())
    finally:
        handle.remove()
    assert seen == {10}
    assert "hooks of user code on all modules" in both.engine.reasons[0]


def test_a_method_for_whole_batches_that_is_called_later(pair: Any) -> None:
    class Logs(Between):
        def log(self, value: float) -> None:
            self.logged[0] += value

    def forward(model: Any, x: Tensor) -> Tensor:
        if model.switch[0]:
            model.log(1.0)
        return x

    both = pair(Logs(forward).double(), once_per_batch=("log",))
    both.model.switch, both.model.logged = [False], [0.0]
    both.model(rows())
    both.model.switch[0] = True
    both.model(rows())
    assert both.model.logged == [1.0]
    assert "log" not in both.model.__dict__
    assert "its forward calls self.log" in both.engine.reasons[0]


def test_a_buffer_that_is_changed_later_is_an_error(pair: Any) -> None:
    switch = bytearray(1)  # nobody looks into it

    def forward(model: Any, x: Tensor) -> Tensor:
        if switch[0]:
            model.count.add_(1)
        return x

    model = Between(forward).double()
    model.register_buffer("count", torch.zeros(()))
    both = pair(model)
    both.model(rows())
    switch[0] = True
    with pytest.raises(RuntimeError, match="has changed a buffer for each of its micro-batches"):
        both.model(rows())


# What user code does in between


def test_a_fallback_for_exceptions_is_not_taken_because_of_the_cut(pair: Any) -> None:
    class Box:
        def __init__(self, content: Tensor) -> None:
            self.content = content

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, box: Box) -> Tensor:
            return self.linear(box.content)  # type: ignore[no-any-return]

    def forward(model: Any, x: Tensor) -> Tensor:
        try:
            return model.inner(Box(x))  # type: ignore[no-any-return]
        except Exception:
            return x * 0

    both = pair(Between(forward, inner=Inner()).double())
    both.step(square)
    assert both.relative_difference < EXACT
    assert "inner is called with a Box, which may hold tensors" in both.engine.reasons[0]


def test_the_gradient_of_a_whole_input_that_is_passed_twice(pair: Any) -> None:
    both = pair(Between(lambda model, x, scale, shift: x * scale + shift).double())
    found = []
    for model in (both.model, both.alone):
        vector = torch.full((8,), 0.5, dtype=torch.float64, requires_grad=True)
        model(rows(), vector, vector).pow(2).mean().backward()
        found.append(vector.grad)
    assert torch.allclose(found[0].cpu(), found[1], rtol=0, atol=EXACT)
    assert both.calls == 1


def test_a_graph_from_outside_after_a_call_without_gradients(pair: Any) -> None:
    scale: list[Tensor] = []
    both = pair(Between(lambda model, x: x * scale[0], outer=nn.Linear(8, 8)).double())

    def loss(model: Any) -> Tensor:
        scale[:] = [torch.tanh(model.outer(torch.ones(8, dtype=torch.float64)))]
        with torch.no_grad():
            model(rows())
        return square(model)

    for _ in range(2):
        both.step(loss)
        assert both.relative_difference < EXACT
    scale.clear()
    assert "a tensor with a graph that is not one of its inputs" in both.engine.reasons[0]


def test_parameters_that_are_computed_from_others(pair: Any) -> None:
    """Model-agnostic meta-learning, first order and second."""
    both = pair(mlp())

    def adapted(model: nn.Module, second: bool) -> Tensor:
        names, parameters = zip(*model.named_parameters(), strict=True)
        inner = torch.autograd.grad((model(rows()) - 1).pow(2).mean(), parameters, create_graph=second)
        fast = {n: torch.tanh(p - 0.1 * g) for n, p, g in zip(names, parameters, inner, strict=True)}
        result: Tensor = torch.func.functional_call(model, fast, (rows(seed=5),)).pow(2).mean()
        return result

    for second in (False, True, False):
        both.step(lambda model, second=second: adapted(model, second))
        assert both.relative_difference < EXACT


def test_parameters_that_are_replaced_for_a_call(pair: Any) -> None:
    for rematerialize in (False, True):
        both = pair(mlp(), rematerialize=rematerialize)
        found = []
        for model in (both.model, both.alone):
            other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
            torch.func.functional_call(model, other, (rows(),)).pow(2).mean().backward()
            found.append([p.grad.cpu() for p in other.values()])
        assert all(torch.allclose(a, b, rtol=0, atol=EXACT) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians_and_hessians(pair: Any, vectorize: bool) -> None:
    both = pair(mlp())
    both.model(rows(4))
    for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        ours, theirs = (
            function(lambda x, m=model: m(x).pow(2).sum(), rows(4), vectorize=vectorize)
            for model in (both.model, both.alone)
        )
        assert torch.allclose(ours.cpu(), theirs, rtol=0, atol=EXACT)


def test_hooks_on_outputs_and_inputs_see_whole_batches(pair: Any) -> None:
    both = pair(mlp())
    seen: list[int] = []

    def loss(model: nn.Module) -> Tensor:
        x = rows().requires_grad_()
        x.register_hook(lambda gradient: seen.append(len(gradient)))
        y = model(x)
        y.retain_grad()
        y.register_hook(lambda gradient: gradient * 0.5)
        return y.pow(2).mean()  # type: ignore[no-any-return]

    both.step(loss)
    assert both.relative_difference < EXACT
    assert seen == [10, 10]
    assert both.calls == 1


def test_a_copy_has_the_forward_that_the_module_had(pair: Any) -> None:
    model = Between(lambda model, x: x).double()
    model.forward = types.MethodType(lambda self, x: self.b(torch.tanh(self.a(x))) * 2, model)
    both = pair(model, on="cpu@speed=1,cpu@speed=1")
    assert torch.allclose(copy.deepcopy(both.model)(rows()), both.alone(rows()))


# Forwards that are run again


def test_outputs_without_a_gradient_need_none(pair: Any) -> None:
    class Stops(Between):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y.detach()

    both = pair(Stops(lambda model, x: x).double(), rematerialize=True)
    assert [y.requires_grad for y in both.model(rows())] == [True, False]
    both.model.requires_grad_(False)
    assert [y.requires_grad for y in both.model(rows())] == [False, False]


def test_a_parameter_that_was_changed_before_the_backward_is_an_error(pair: Any) -> None:
    both = pair(mlp(), rematerialize=True)
    for model in (both.model, both.alone):
        loss = square(model)
        with torch.no_grad():
            model[2].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
            loss.backward()
    both.alone.load_state_dict({name: value.cpu() for name, value in both.model.state_dict().items()})
    both.step(square)
    assert both.relative_difference < EXACT


@ON_ACCELERATORS
def test_two_backwards_at_once_draw_their_own_numbers(pair: Any, accelerator: EmulatedAccelerator) -> None:
    """With outputs on an accelerator, a second call begins its backward before the first has ended."""
    one, two = accelerator.devices[:2]
    both = pair(
        nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)) for _ in range(4))).double(),
        on=f"{one},{two},cpu",
        no_split=("Sequential",),
        rematerialize=True,
    )
    first: list[Tensor] = []
    for _ in range(15):
        torch.manual_seed(5)
        both.model.zero_grad()
        (both.model(rows(9)).pow(2).mean() + both.model(rows(5, seed=4)).pow(2).mean()).backward()
        found = [p.grad.cpu() for p in both.model.parameters()]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@ON_ACCELERATORS
def test_hooks_of_a_parameter_while_two_calls_are_in_their_backward(
    pair: Any, accelerator: EmulatedAccelerator
) -> None:
    one, two = accelerator.devices[:2]
    for on in (f"{one},{two},cpu", f"cpu,{one},{two}"):
        both = pair(mlp(), on=on)
        for model in (both.model, both.alone):
            model[0].weight.register_hook(lambda gradient: gradient * 0.5)
        for _ in range(15):
            both.step(lambda model: (model(rows()) + model(rows(seed=9))).pow(2).mean())
            assert both.relative_difference < EXACT


# Who else is at work


def test_another_thread_may_call_the_model_during_a_backward(pair: Any) -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return Late.apply(self.linear(x))  # type: ignore[no-any-return]

    both = pair(nn.Sequential(Slow(), Slow(), Slow()).double())
    both.step(square)
    Late.runs.clear()
    failed: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(3):
                assert Late.runs.wait(10)
                with torch.no_grad():
                    both.model(rows(8))
                Late.runs.clear()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(3):
            both.step(square)
            assert both.relative_difference < EXACT
    finally:
        Late.runs.set()
        thread.join()
    assert not failed


def test_several_threads_train_on_one_model(pair: Any) -> None:
    both = pair(mlp(), on="cpu@speed=1,cpu@speed=1")
    expected = {}
    for count in (4, 6, 9):
        x = rows(count).requires_grad_()
        expected[count] = torch.autograd.grad(both.alone(x).pow(2).mean(), x)[0]
    wrong: list[Any] = []

    def work() -> None:
        for step in range(15):
            count = (4, 6, 9)[step % 3]
            x = rows(count).requires_grad_()
            try:
                (found,) = torch.autograd.grad(both.model(x).pow(2).mean(), x)
            except BaseException as error:
                wrong.append(error)
                return
            if not torch.allclose(found, expected[count], rtol=0, atol=EXACT):
                wrong.append(count)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_of_hundreds_of_steps(pair: Any) -> None:
    both = pair(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 4)).double())

    def step(number: int) -> None:
        y = both.model(rows(12))
        if number % 3:  # every third output is thrown away
            y.pow(2).mean().backward()

    def tensors() -> int:
        return sum(issubclass(type(obj), Tensor) for obj in gc.get_objects())

    for number in range(10):
        step(number)
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        for number in range(200):
            step(number)
        assert tensors() <= before + 8
    finally:
        gc.enable()


def test_low_precision_does_not_hide_a_small_coupling(pair: Any) -> None:
    for coupling, calls in ((0.0, 1), (0.01, 0)):
        both = pair(Between(lambda model, x, c=coupling: x - c * x.mean(0)), on="cpu@speed=1,cpu@speed=1")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            both.model(rows(64).float())
        assert both.calls == calls


def test_a_variational_autoencoder_is_cut(pair: Any) -> None:
    def sampled(model: Any, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * F.softplus(x)

    both = pair(Between(sampled).double())
    both.model(rows())
    both.model.eval()
    both.model(rows())
    assert both.calls == 2
    assert both.engine.reasons == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of its own look
def test_a_compiled_function_between_layers(pair: Any) -> None:
    doubled = torch.compile(lambda x: torch.tanh(x) * 2, backend="eager")
    both = pair(Between(lambda model, x: doubled(x)).double(), on="cpu@speed=1,cpu@speed=1")
    both.step(square)
    assert both.relative_difference < EXACT
    assert both.calls == 1
