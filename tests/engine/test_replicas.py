"""Modules with replicas: devices that share the rows of a batch give the numbers of one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.devices import resolve_devices
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.cut_models import Between, Everything
from lightning_hetero.testing.models import MODELS

EXACT = 1e-12
Spread = Callable[..., Any]


class Outer(nn.Module):
    """A module whose part `net` gets replicas."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def rows(count: int = 10, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def names(devices: str) -> tuple[str, ...]:
    return resolve_devices(devices).names


@pytest.fixture
def spread(pair: Any, names: tuple[str, ...]) -> Spread:
    """`spread(model)` puts replicas of all of it on three devices; the first owns the parameters."""

    def make(model: nn.Module, where: Any = None, **options: Any) -> Any:
        torch.manual_seed(0)
        return pair(model.double(), where or {"": {names[0]: 2, names[1]: 1, names[2]: 1}}, **options)

    return make


def descend(both: Any) -> None:
    """A step of SGD for both models."""
    with torch.no_grad():
        for model in (both.model, both.alone):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)


def train(both: Any, x: Tensor | None = None, *, steps: int = 3) -> None:
    """Steps in which every gradient is that of one device."""
    x = rows() if x is None else x
    for _ in range(steps):
        both.step(lambda model: model(x).pow(2).mean())
        assert both.difference < EXACT
        descend(both)


def busy(both: Any, run: Callable[[], Any]) -> dict[str, str]:
    """What each device does in `run`, such as "F0 F2 B2 B0"."""
    with both.placed.recording() as recording:
        run()
    spans = recording.timeline.spans
    return {
        device: " ".join(sorted(f"{span.op}{span.micro_batch}" for span in spans if span.device == device))
        for device in both.placed.plan.inventory.names
    }


# What runs where


def test_every_replica_takes_its_share_of_the_micro_batches(spread: Spread, names: tuple[str, ...]) -> None:
    both = spread(Outer(mlp()))
    train(both)
    assert both.calls == 3
    found = busy(both, lambda: both.model(rows(16)).sum().backward())
    assert found == {names[0]: "B0 B3 F0 F3", names[1]: "B1 F1", names[2]: "B2 F2"}


def test_micro_batches_as_large_as_the_shares(spread: Spread, names: tuple[str, ...]) -> None:
    both = spread(Outer(mlp()), {"": {names[0]: 3, names[1]: 1}}, micro_batches=2, weights=(3, 1))
    train(both)
    assert both.engine.split(16) == [12, 4]
    assert busy(both, lambda: both.model(rows(16))) == {names[0]: "F0", names[1]: "F1", names[2]: ""}


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("chain", [False, True])
def test_a_stage_of_a_pipeline_has_replicas(
    spread: Spread, names: tuple[str, ...], rematerialize: bool, chain: bool
) -> None:
    model = nn.Sequential(*(mlp() for _ in range(4)))
    last = {names[1]: 1, names[2]: 1}
    key = "" if chain else "net."
    where = {f"{key}0": names[0], f"{key}1": names[0], "": last}
    both = spread(model if chain else Outer(model), where, rematerialize=rematerialize)
    train(both)
    assert both.calls == 3
    found = busy(both, lambda: both.model(rows(16)))
    assert found == {names[0]: "F0 F1 F2 F3", names[1]: "F0 F2", names[2]: "F1 F3"}


# Models


@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "convnet"])  # it has BatchNorm
def test_the_small_models(spread: Spread, name: str, rematerialize: bool) -> None:
    make, inputs = MODELS[name]
    both = spread(Outer(make()), rematerialize=rematerialize)
    train(both, inputs(10, torch.Generator().manual_seed(0)))
    assert both.calls == 3


def test_a_convolutional_network(spread: Spread) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    both = spread(Outer(net))
    train(both, rows(10, 48).view(10, 3, 4, 4))
    assert both.calls == 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(spread: Spread, kind: Any) -> None:
    net = Between(
        lambda model, x: model.cell(x.view(len(x), 2, 4))[0][:, -1],
        cell=kind(4, 4, num_layers=2, bidirectional=True, batch_first=True),
    )
    both = spread(net, {"": {"emulated:0": 1, "emulated:1": 2}}, on="cpu@speed=1,cpu@speed=1")
    train(both)
    assert both.calls == 3


def test_tied_weights_within_the_replicas(spread: Spread) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]

    both = spread(Outer(Tied()))
    train(both)
    assert both.calls == 3


def test_a_module_called_twice_and_three_regions_at_once(spread: Spread) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = mlp(), mlp(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.a(x)) + self.b(x * 2))  # type: ignore[no-any-return]

    both = spread(Branches())
    train(both)
    # The step of user code need not call the model itself.
    both.step(lambda model: model.c(model.a(model.a(rows())) + model.b(rows() * 2)).pow(2).mean())
    assert both.difference < EXACT
    assert both.calls == 3 + 4


@pytest.mark.parametrize("rematerialize", [False, True])
def test_regions_whose_backwards_run_at_the_same_time(spread: Spread, rematerialize: bool) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(), mlp()

    both = spread(Branches(), rematerialize=rematerialize)
    for _ in range(10):
        both.step(lambda model: (model.a(rows()) * model.b(rows(10) * 2)).pow(2).mean())
        assert both.difference < EXACT


def test_structures_of_tensors_go_in_and_out(spread: Spread) -> None:
    both = spread(Everything())
    x = rows()

    def loss(model: nn.Module) -> Tensor:
        found = model({"x": x, "nothing": None}, factor=2.0, shift=rows(9)[8], flags=["text", True])
        assert found["right"][0] == ["text", True]
        assert found["choice"].shape == (10,)
        total: Tensor = found["left"].rows.pow(2).mean() + found["right"][1].mean()
        return total

    for _ in range(2):
        both.step(loss)
        assert both.difference < EXACT
    assert both.calls == 2


def test_odd_buffers_and_parameters(spread: Spread) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("order", torch.arange(8).flip(0))
            self.register_buffer("mask", torch.tensor([True] * 7 + [False]))
            self.register_buffer("wide", torch.full((1,), 3.0, dtype=torch.float64).expand(8))
            self.register_buffer("nothing", torch.empty(0))
            self.register_buffer("none", None)
            self.counts = nn.Parameter(torch.arange(8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)[:, self.order] * self.mask * self.wide + self.counts  # type: ignore[no-any-return]

    both = spread(Outer(Odd()))
    train(both)
    assert both.calls == 3


def test_a_sparse_buffer(pair: Any) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("adjacency", torch.eye(8, dtype=torch.float64).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacency, self.linear(x).T).T

    both = pair(Outer(Graph()).double(), {"": {"emulated:0": 1, "emulated:1": 1}}, on="cpu@speed=1,cpu@speed=1")
    train(both)
    assert both.calls == 3


def test_a_table_with_sparse_gradients(pair: Any) -> None:
    net = Between(
        lambda model, x: model.table((x.abs() * 3).long()).sum(1), table=nn.Embedding(40, 8, sparse=True)
    ).double()
    both = pair(net, {"": {"emulated:0": 1, "emulated:1": 1}}, on="cpu@speed=1,cpu@speed=1")
    for model in (both.model, both.alone):
        model(rows()).pow(2).mean().backward()
    found, expected = both.model.table.weight.grad, both.alone.table.weight.grad
    assert found.layout == expected.layout == torch.sparse_coo
    assert (found.to_dense() - expected.to_dense()).abs().max() < EXACT
    assert both.calls == 1


def test_parameters_keep_their_class_and_attributes(spread: Spread) -> None:
    class Scaled(nn.Parameter):
        def scaled(self) -> Tensor:
            return self * self.scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Scaled(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.scaled()

    both = spread(Outer(Net()))
    for model in (both.model, both.alone):
        model.net.weight.scale = 3.0
    train(both)
    assert both.calls == 3


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal"])
def test_parametrizations(spread: Spread, name: str) -> None:
    parametrize = getattr(nn.utils.parametrizations, name)
    both = spread(Outer(nn.Sequential(parametrize(nn.Linear(8, 8).double()), nn.Tanh(), nn.Linear(8, 8))))
    train(both)
    assert both.calls == 3


# Batch normalisation


def test_running_statistics_are_those_of_the_whole_batch(spread: Spread) -> None:
    both = spread(Outer(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))), defers_batch_norm=True)
    for model in (both.model, both.alone):
        for _ in range(3):
            model(rows()).pow(2).mean().backward()
    assert both.calls == 3
    for found, expected in zip(both.model.buffers(), both.alone.buffers(), strict=True):
        assert (found.cpu() - expected).abs().max() < EXACT
    both.model.eval()
    both.alone.eval()
    train(both)
    assert both.calls == 6


def test_batch_normalisation_is_not_cut_unless_that_was_asked_for(spread: Spread) -> None:
    both = spread(Outer(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))))
    train(both)
    assert both.calls == 0
    assert "net.0 (BatchNorm1d) uses the mean and variance of the whole batch" in both.engine.reasons[0]


# Calls of all kinds


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_batches_of_any_size(spread: Spread, count: int) -> None:
    both = spread(Outer(mlp()), weights=(2, 1, 1), micro_batches=3)
    train(both)
    both.step(lambda model: model(rows(count)).pow(2).mean())
    assert both.difference < EXACT
    assert both.calls == 3 + (count > 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_between_others(spread: Spread, mode: Any) -> None:
    both = spread(Outer(mlp()))
    for _ in range(2):
        train(both, steps=1)
        with mode():
            assert (both.model.eval()(rows()) - both.alone.eval()(rows())).abs().max() < EXACT
        both.model.train(), both.alone.train()
    assert both.calls == 4


def test_frozen_parameters_and_thawed_ones(spread: Spread) -> None:
    both = spread(Outer(mlp()))
    for learns in (False, True, False, True):
        for model in (both.model, both.alone):
            model.net[0].weight.requires_grad_(learns)
            model.zero_grad(set_to_none=True)
        train(both, steps=2)
        assert (both.model.net[0].weight.grad is not None) == learns
    assert both.calls == 8


def test_a_parameter_that_is_frozen_between_forward_and_backward(spread: Spread) -> None:
    both = spread(Outer(mlp()))
    for model in (both.model, both.alone):
        loss = model(rows()).pow(2).mean()
        model.net[0].weight.requires_grad_(False)
        with torch.no_grad():
            model(rows())
        loss.backward()
        model.net[0].weight.requires_grad_(True)
    assert both.difference < EXACT


def test_inputs_outputs_and_parameters_that_are_passed_through(spread: Spread) -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.linear(x), x, self.linear.weight

    both = spread(Leaky())
    x = rows().requires_grad_()
    for _ in range(2):
        both.step(lambda model: sum((each.pow(2).mean() for each in model(x)), torch.zeros(())))
        assert both.difference < EXACT


def test_retain_graph_and_a_gradient_of_a_gradient(spread: Spread) -> None:
    both = spread(Outer(mlp()))
    for model in (both.model, both.alone):
        loss = model(rows()).pow(2).mean()
        for last in (False, False, True):
            loss.backward(retain_graph=not last)
    assert both.difference < EXACT
    assert both.calls == 1

    def penalty(model: nn.Module) -> Tensor:
        x = rows().requires_grad_()
        y = model(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return gradient.norm() + y.mean()

    for _ in range(2):
        both.step(penalty)
        assert both.difference < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside(spread: Spread, reentrant: bool) -> None:
    net = Between(
        lambda model, x: model.b(checkpoint(lambda x: torch.tanh(model.a(x)), x, use_reentrant=reentrant)),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
    )
    train(spread(Outer(net)), rows().requires_grad_())


def test_transforms_of_torch_func(spread: Spread) -> None:
    both = spread(Outer(mlp()))
    train(both)
    found = []
    for model in (both.model, both.alone):
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(values: Any, model: nn.Module = model) -> Tensor:
            output: Tensor = torch.func.functional_call(model, values, (rows(),))
            return output.pow(2).mean()

        found.append(torch.func.grad(loss)(values))
    for name, gradient in found[1].items():
        assert (found[0][name].cpu() - gradient).abs().max() < EXACT


def test_autocast(pair: Any) -> None:
    both = pair(Outer(mlp()), {"": {"emulated:0": 1, "emulated:1": 1}}, on="cpu@speed=1,cpu@speed=1")
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            both.step(lambda model: model(rows().float()).float().pow(2).mean())
        assert both.relative_difference < 0.05  # sums of bfloat16 in another order
    assert both.calls == 3


def test_the_same_seed_gives_the_same_dropout(spread: Spread) -> None:
    both = spread(Outer(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        both.model.zero_grad()
        both.model(rows()).pow(2).mean().backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in both.model.parameters()]))
    assert both.calls == 3
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# What moves


def test_what_moves_between_devices(accelerator: EmulatedAccelerator, pair: Any) -> None:
    width = 64
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).double()
    weights = sum(p.numel() for p in net.parameters()) * 8
    both = pair(net, {"": {"cpu": 1, "dev:0": 1, "dev:1": 1}}, on="cpu,dev:0,dev:1", micro_batches=3)
    x = rows(9, width)
    part = 3 * width * 8  # of the batch or of the output, for one replica

    def moved(run: Callable[[], Any]) -> set[tuple[int, int]]:
        """Bytes that each replica gets and gives."""
        accelerator.reset()
        run()
        return {(accelerator.stats(index).h2d_bytes, accelerator.stats(index).d2h_bytes) for index in range(2)}

    def step() -> None:
        both.model(x).pow(2).mean().backward()

    assert moved(step) == {(weights + 2 * part, weights + part)}
    assert moved(step) == {(2 * part, weights + part)}, "nothing has changed, as when gradients are accumulated"
    with torch.no_grad():
        assert moved(lambda: both.model(x)) == {(part, part)}
        both.model[0].bias.add_(1)
        assert moved(lambda: both.model(x)) == {(part + width * 8, part)}, "only what has changed"
