"""What user code does to modules with replicas, and what silently corrupts training if replicas do not notice."""

from __future__ import annotations

import copy
import gc
import pickle
import queue
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.engine.replicas import Copies
from lightning_hetero.runtime.placed import Pipelining, PlacedModel

EXACT = 1e-12
Spread = Callable[..., Any]


class Outer(nn.Module):
    """A module whose part `net` gets replicas."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Linear(nn.Module):
    """A layer, for subclasses that do something besides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def rows(count: int = 10, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def names(devices: str) -> tuple[str, ...]:
    return resolve_devices(devices).names


@pytest.fixture
def spread(pair: Any, names: tuple[str, ...]) -> Spread:
    """`spread(net)` puts replicas of `net` on three devices; the first owns the parameters."""

    def make(net: nn.Module, **options: Any) -> Any:
        torch.manual_seed(0)
        return pair(Outer(net).double(), {"": {names[0]: 2, names[1]: 1, names[2]: 1}}, **options)

    return make


def train(both: Any, steps: int = 1) -> None:
    """Steps in which every gradient is that of one device."""
    for _ in range(steps):
        both.step(lambda model: model(rows()).pow(2).mean())
        assert both.difference < EXACT
        with torch.no_grad():
            for model in (both.model, both.alone):
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)


def each(both: Any, change: Callable[[Any], Any]) -> list[Any]:
    """Do the same to `net` of both models."""
    return [change(model.net) for model in (both.model, both.alone)]


# Parameters


def _clamp(p: Tensor) -> None:
    p.data.clamp_(-0.05, 0.05)


def _new_data(p: Tensor) -> None:
    p.data = p.data * 1.3


def _reversed_rows(p: Tensor) -> None:
    p.data.copy_(p.data.flip(0).clone())


def _reversed_columns(p: Tensor) -> None:
    p.data.copy_(p.data.flip(-1).clone())


def _swapped(p: Tensor) -> None:
    p.data[[0, 1]] = p.data[[1, 0]].clone()


def _one_value(p: Tensor) -> None:
    p.data.view(-1)[3] *= 1 + 1e-6


def _negated(p: Tensor) -> None:
    p.data.neg_()


MOVES = [_reversed_rows, _reversed_columns, _swapped, _negated]
CHANGES = [_clamp, _new_data, _one_value, *MOVES]
LARGE = [
    *((dtype, change) for dtype in (torch.float64, torch.float32) for change in CHANGES),
    *((dtype, change) for dtype in (torch.bfloat16, torch.complex64, torch.int64) for change in MOVES),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_changes_through_data_reach_the_replicas(spread: Spread, name: str, change: Callable[[Tensor], None]) -> None:
    both = spread(mlp())
    train(both, 2)
    each(both, lambda net: change(net.get_parameter(name)))
    train(both, 2)
    assert both.calls == 4


@pytest.mark.parametrize(("dtype", "change"), LARGE)
@pytest.mark.parametrize("shape", [(300, 70), (21_001,), (2, 3, 70, 50)])
def test_changes_of_large_tensors_are_seen_too(
    shape: tuple[int, ...], dtype: torch.dtype, change: Callable[[Tensor], None]
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    original = (values * 1e9 if dtype == torch.int64 else values).to(dtype)
    copies = Copies(torch.device("cpu"))
    copies.refresh([original])
    before = original.clone()
    change(original)
    copies.refresh([original])
    assert torch.equal(copies.of(original), original)
    copies.refresh([before])
    assert torch.equal(copies.of(before), before)
    assert list(copies.home.values()) == [before]


def test_parameters_that_are_replaced_are_followed_and_let_go(spread: Spread) -> None:
    both = spread(mlp())
    train(both)
    for seed in range(4):

        def replace(net: Any, seed: int = seed) -> None:
            values = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            net[0].weight = nn.Parameter(values.to(net[0].weight.device))

        each(both, replace)
        train(both)
    assert {len(copies.home) for copies in both.engine.interceptions.copies.values()} == {0, 4}


def test_another_dtype_and_back(spread: Spread) -> None:
    both = spread(mlp())
    for _ in range(3):
        train(both)
        both.model.float(), both.alone.float()
        both.step(lambda model: model(rows().float()).pow(2).mean())
        assert both.relative_difference < 1e-5
        both.model.double(), both.alone.double()
    assert both.calls == 6
    assert {len(copies.home) for copies in both.engine.interceptions.copies.values()} == {0, 4}


def test_a_change_between_forward_and_backward_is_what_it_is_on_one_device(spread: Spread) -> None:
    both = spread(mlp())
    for change in (_clamp, _new_data):
        each(both, lambda net: net.zero_grad())
        for model in (both.model, both.alone):
            first = model(rows()).pow(2).mean()
            change(model.net[2].weight)
            (first + model(rows() * 2).pow(2).mean()).backward()
        assert both.difference < EXACT
    for model in (both.model, both.alone):
        first = model(rows()).pow(2).mean()
        with torch.no_grad():
            model.net[2].weight.mul_(1.1)
            model(rows())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward()


def test_an_optimizer_that_calls_the_model_itself(spread: Spread) -> None:
    both = spread(mlp())
    for model in (both.model, both.alone):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(rows()).pow(2).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    for p, q in zip(both.model.parameters(), both.alone.parameters(), strict=True):
        assert (p.cpu() - q).abs().max() < 1e-10
    assert both.calls > 3


# State


class Counts(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Remembers(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Lists(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return super().forward(x)


class Buffers(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.detach().sum()
        return super().forward(x)


class NewBuffers(Buffers):
    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + x.detach().sum()
        return Linear.forward(self, x)


class Registers(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("ones", torch.ones(8, dtype=x.dtype))
        return super().forward(x) * self.ones


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (Counts, lambda net: net.calls),
        (Remembers, lambda net: net.last.tolist()),
        (Lists, lambda net: net.seen),
        (Buffers, lambda net: round(float(net.total), 9)),
        (NewBuffers, lambda net: round(float(net.total), 9)),
        (Registers, lambda net: list(net.state_dict())),
    ],
)
def test_what_a_forward_leaves_in_its_module_is_not_lost(
    spread: Spread, make: Callable[[], nn.Module], state: Callable[[Any], Any]
) -> None:
    both = spread(make())
    train(both, 5)
    found, expected = each(both, state)
    assert found == expected
    assert both.engine.reasons


class Later(Linear):
    """Begins to leave something in the middle of training, where nothing that is looked into tells that it will."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.begins = bytearray(1)
        self.what = what
        self.rows: int | None = None
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.begins[0] and self.what == "attribute":
            self.rows = len(x)
        if self.begins[0] and self.what == "buffer":
            self.count += 1
        return super().forward(x)


def test_an_attribute_that_is_set_later_on_is_that_of_the_whole_batch(spread: Spread) -> None:
    both = spread(Later("attribute"))
    train(both, 2)
    each(both, lambda net: net.begins.__setitem__(0, True))
    for _ in range(2):
        train(both)
        assert each(both, lambda net: net.rows) == [10, 10]
    assert "changes the attribute 'rows' of Later, which it did not do in its trial" in both.engine.reasons[0]
    assert both.calls == 3


def test_a_buffer_that_is_changed_later_on_is_an_error(spread: Spread) -> None:
    both = spread(Later("buffer"))
    train(both, 2)
    each(both, lambda net: net.begins.__setitem__(0, True))
    with pytest.raises(RuntimeError, match="changed a buffer for each of its micro-batches, which it did not do in"):
        both.model(rows())


# Modules


def test_modules_that_are_added_and_taken_away(spread: Spread) -> None:
    both = spread(mlp())
    train(both)

    def add(net: Any) -> None:
        torch.manual_seed(5)
        net.append(nn.Linear(8, 8).double().to(net[0].weight.device))

    each(both, add)
    train(both, 2)
    each(both, lambda net: net.pop(3))
    train(both, 2)
    assert both.calls == 5


def test_modules_that_know_their_parent_or_a_sibling_or_a_method(spread: Spread) -> None:
    class Family(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.second = Linear()
            self.again = [self.second]
            self.second.__dict__["parent"] = self
            self.method = self.work

        def work(self, x: Tensor) -> Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            return self.again[0].parent.method(torch.tanh(self.second(x)))  # type: ignore[no-any-return]

    both = spread(Family())
    train(both, 3)
    assert both.calls == 3


def test_closures_over_a_module(spread: Spread) -> None:
    class Free(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.function(super().forward(x))  # type: ignore[no-any-return]

    both = spread(Free())

    def bind(net: Any) -> None:
        net.function = lambda x: net.linear(x) * net.linear.weight.sum()

    each(both, bind)
    train(both, 3)


def test_tensors_in_plain_attributes(spread: Spread) -> None:
    class Scaled(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.linspace(0, 1, 8, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    both = spread(Scaled())
    train(both, 3)
    assert both.calls == 3


def test_inputs_that_are_changed_in_place(spread: Spread) -> None:
    class InPlace(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    both = spread(InPlace())
    for _ in range(2):
        inputs = rows(), rows()
        for model, x in zip((both.model, both.alone), inputs, strict=True):
            model.zero_grad()
            model(x).pow(2).mean().backward()
        assert both.difference < EXACT
        assert torch.equal(*inputs)


def test_classes_with_ideas_of_their_own(pair: Any, names: tuple[str, ...]) -> None:
    class Strict(Linear):
        """Allows no attributes after its constructor."""

        def __init__(self) -> None:
            super().__init__()
            self.ready = True

        def __setattr__(self, name: str, value: Any) -> None:
            if self.__dict__.get("ready"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    class Wants(Linear):
        def __new__(cls, *needed: int) -> Any:
            if not needed:
                raise TypeError("cannot be made without arguments")
            return super().__new__(cls)

        def __init__(self, needed: int) -> None:
            super().__init__()

        def __deepcopy__(self, memo: Any) -> Any:
            other = type(self)(1)
            other.linear = copy.deepcopy(self.linear, memo)
            return other

    both = pair(Outer(nn.Sequential(Strict(), Wants(1))).double(), {"": {names[0]: 1, names[1]: 1}})
    train(both, 3)
    assert both.calls == 3


def _script(net: nn.Module) -> nn.Module:
    scripted: nn.Module = torch.jit.script(net)
    return scripted


def _compiled(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def _with_its_own_forward(net: nn.Module) -> nn.Module:
    net.forward = types.MethodType(lambda self, x: self[2](self[0](x)), net)  # type: ignore[method-assign]
    return net


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_script, "net.0 is a TorchScript module"),
        (_compiled, "net.0 was compiled by torch.compile"),
        (_with_its_own_forward, "the method forward of net.0 was replaced for this very object"),
        (lambda net: nn.Sequential(net, nn.LazyLinear(4)).double(), "net.0.1 is lazy and has no parameters yet"),
    ],
)
def test_what_cannot_have_replicas_runs_on_its_own_device(
    change: Callable[[nn.Module], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Outer(nn.Sequential(change(mlp().double())))
    places = {"": {"emulated:0": 1, "emulated:1": 1}}
    problem = Problem(graph=find_units(model), inventory=resolve_devices("cpu@speed=1,cpu@speed=1"))
    placed = PlacedModel(model, make_plan(ManualPolicy(places), problem), Pipelining(micro_batches=2))
    placed.place()
    found = model(rows())
    placed.release(torch.device("cpu"))
    assert torch.equal(found, model(rows()))
    assert f"{reason.replace('net.', '', 1)}. All of it runs on emulated:0; the results are the same." in caplog.text


# Hooks


@pytest.mark.parametrize("where", ["", "0"])
def test_hooks_see_the_whole_batch_and_the_module_itself(spread: Spread, where: str) -> None:
    both = spread(mlp())
    calls: list[list[Any]] = [[], []]
    for model, called in zip((both.model, both.alone), calls, strict=True):
        hooked = model.net.get_submodule(where)
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            getattr(hooked, register)(
                lambda module, *values, h=hooked, c=called, r=register: c.append((r, len(values[0][0]), module is h))
            )
    x = rows().requires_grad_()
    both.step(lambda model: model(x).pow(2).mean())
    both.step(lambda model: model.net(x).pow(2).mean())
    assert both.difference < EXACT
    assert calls[0] == calls[1]


def test_hooks_that_come_and_go(spread: Spread) -> None:
    both = spread(mlp())
    train(both)
    for hook in (lambda module, args, output: output * 2, lambda module, args, output: output - output.mean(0)):
        for where in ("", "1"):
            handles = each(both, lambda net, w=where, h=hook: net.get_submodule(w).register_forward_hook(h))
            train(both)
            both.step(lambda model: model.net(rows()).pow(2).mean())
            assert both.difference < EXACT
            for handle in handles:
                handle.remove()
            train(both)
    assert both.calls == 5


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "parametrizations.spectral_norm"])
def test_weights_that_change_in_forward_are_right(pair: Any, names: tuple[str, ...], name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    library = nn.utils.parametrizations if "." in name else nn.utils
    layer = getattr(library, name.rpartition(".")[2])(layer)
    if not name.startswith("parametrizations"):
        layer.weight = layer.weight.detach()  # so that the model can be copied
    both = pair(Outer(nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 8).double())), {"": {names[0]: 1, names[1]: 1}})
    train(both, 4)


# Failure, copies, and the end


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.fails:
            raise KeyError("in backward")
        return *gradients, None


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_on_a_replica_says_where(pair: Any, names: tuple[str, ...], where: str) -> None:
    class Failing(Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            first = threading.current_thread().name == f"hetero-worker-{names[1]}"
            if Failing.fails and first and where == "forward":
                raise KeyError("here")
            return Fails.apply(super().forward(x), Failing.fails and first)  # type: ignore[no-any-return,no-untyped-call]

    both = pair(Outer(Failing()).double(), {"": {names[0]: 1, names[1]: 1}})
    train(both, 2)
    Failing.fails = True
    with pytest.raises(KeyError) as caught:
        both.model(rows()).pow(2).mean().backward()
    at, part = caught.value.__notes__
    assert at == f"{where} of net on {names[1]}"
    assert part in {f"micro-batch {index} of 4 in Outer" for index in (1, 3)}  # its own; either may come first
    Failing.fails = False
    train(both, 2)


def test_copies_of_a_module_and_its_state_know_nothing_of_replicas(spread: Spread) -> None:
    both = spread(mlp())
    train(both, 2)
    for other in (copy.deepcopy(both.model), pickle.loads(pickle.dumps(both.model))):
        assert list(other.state_dict()) == list(both.alone.state_dict())
        assert (other(rows()) - both.alone(rows())).abs().max() < EXACT
    train(both, 2)


def test_nothing_is_left_when_the_run_ends(devices: str, names: tuple[str, ...]) -> None:
    threads = set(threading.enumerate())
    model = Outer(mlp()).double()
    problem = Problem(graph=find_units(model), inventory=resolve_devices(devices))
    plan = make_plan(ManualPolicy({"": dict.fromkeys(names, 1)}), problem)
    placed = PlacedModel(model, plan, Pipelining(micro_batches=3))
    placed.place()
    output = model(rows())
    output.sum().backward()
    assert placed.engine is not None
    kept = [weakref.ref(output), weakref.ref(placed.engine)]
    del output
    assert kept[0]() is None
    seats, copies = placed.engine.interceptions.seats, placed.engine.interceptions.copies.values()
    kept += [weakref.ref(part) for seat in seats for twin in seat.twins for part in twin.modules()]
    kept += [weakref.ref(copied.of(original)) for copied in copies for original in copied.home.values()]
    assert len(kept) == 2 + 2 * 4 + 2 * 4
    del seats, copies
    placed.release(torch.device("cpu"))
    assert set(threading.enumerate()) == threads
    gc.collect()
    assert not any(reference() for reference in kept)


def test_replicas_keep_no_graph_and_no_activations(pair: Any, names: tuple[str, ...]) -> None:
    seen: queue.SimpleQueue[weakref.ref[Tensor]] = queue.SimpleQueue()  # no trial looks into it

    class Seen(Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(super().forward(x))
            seen.put(weakref.ref(hidden))
            return self.linear(hidden)  # type: ignore[no-any-return]

    both = pair(Outer(Seen()).double(), {"": {names[0]: 1, names[1]: 1}})
    for _ in range(3):
        both.model(rows()).pow(2).mean().backward()
        both.model(rows())  # never differentiated
    assert both.calls == 6
    assert seen.qsize() >= 6
    assert not any(seen.get()() is not None for _ in range(seen.qsize()))
