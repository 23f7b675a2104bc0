"""Unusual modules: each is cut and gives the numbers of one device, or runs whole and says why."""

from __future__ import annotations

import math
import random
import types
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_hetero.testing.cut_models import Between

EXACT = 1e-12
COUPLED = "its rows depend on each other"

Loss = Callable[[nn.Module], Tensor]


def rows(count: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(count: int = 10) -> Tensor:
    return torch.randint(11, (count, 6), generator=torch.Generator().manual_seed(1))


def square(model: nn.Module) -> Tensor:
    return model(rows()).pow(2).mean()  # type: ignore[no-any-return]


def of_tokens(model: nn.Module) -> Tensor:
    return model(tokens()).pow(2).mean()  # type: ignore[no-any-return]


def chain(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


class Net(nn.Module):
    """Its forward is a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Counting(Net):
    calls = 0


class Rounding(torch.autograd.Function):
    """Rounds; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Any) -> Tensor:
        return (x / step).round() * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Reversal(torch.autograd.Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -gradient * x.sign()


class Normalised(torch.autograd.Function):
    """Gives every batch a gradient of the same size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


class Kinked(torch.autograd.Function):
    """Some rows have another gradient beside others, by a hundredth: as if an activation fell over a kink."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kinked: Tensor) -> Tensor:
        ctx.factor = 1 + 0.01 * kinked * (len(x) > 1)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def first_at_kink(model: nn.Module) -> Tensor:
    kinked = torch.zeros(10, 1, dtype=torch.float64)
    kinked[0] = 1
    return model(rows(), kinked).pow(2).mean()  # type: ignore[no-any-return]


def routed(model: Any, x: Tensor) -> Tensor:
    """A mixture of experts, one for each row."""
    weight, choice = model.router(x).softmax(-1).max(-1)
    y = torch.zeros_like(x)
    for index, expert in enumerate(model.experts):
        chosen = (choice == index).nonzero().flatten()
        if chosen.numel():
            y = y.index_add(0, chosen, expert(x[chosen]) * weight[chosen, None])
    return model.b(y)  # type: ignore[no-any-return]


def routed_with_capacity(model: Any, x: Tensor) -> Tensor:
    """A switch transformer's layer: an expert that is full leaves rows out."""
    weight, choice = model.router(x).softmax(-1).max(-1)
    one_hot = F.one_hot(choice, 3)
    kept = (one_hot.cumsum(0) * one_hot).sum(-1) <= math.ceil(len(x) / 3)
    y = x
    for index, expert in enumerate(model.experts):
        y = torch.where(((choice == index) & kept)[:, None], expert(x) * weight[:, None], y)
    return model.b(y)  # type: ignore[no-any-return]


def experts(function: Callable[..., Any]) -> nn.Module:
    return Net(function, router=nn.Linear(8, 3), experts=nn.ModuleList(nn.Linear(8, 8) for _ in range(3)))


def causal(model: Any, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    return model.head(model.encoder(model.embed(x), mask=mask))  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return Net(
        causal,
        embed=nn.Embedding(11, 8),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(8, 11),
    )


def recurrent(model: Any, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), 8, dtype=x.dtype, device=x.device)
    states = []
    for step in x.unbind(1):
        state = model.cell(model.a(step), state)
        states.append(model.b(state))
    return torch.stack(states, 1)


def packed(model: Any, x: Tensor, lengths: Tensor) -> Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    _, last = model.lstm(sequence)
    return model.b(model.a(last[0][-1]))  # type: ignore[no-any-return]


def sorted_inside(model: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return model.b(model.a(x[order])[order.argsort()])  # type: ignore[no-any-return]


def shared_weights() -> nn.Module:
    model: Any = Net(lambda m, x: m.b(m.c(torch.tanh(m.a(x))).tanh() + m.a(x)), c=nn.Linear(8, 8))
    model.d = nn.Linear(8, 8)
    model.function = lambda m, x: m.b(m.c(m.d(torch.tanh(m.a(x)))))
    model.d.weight = model.a.weight
    return model


def parameter_containers() -> nn.Module:
    lists = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
    named = nn.ParameterDict({"k": nn.Parameter(torch.ones(8))})
    return Net(lambda m, x: m.b(m.a(x) * m.lists[0] + m.lists[1] * m.named["k"]), lists=lists, named=named)


def sparse_adjacency() -> nn.Module:
    model = Net(lambda m, x: m.b(torch.sparse.mm(m.adjacency, m.a(x).T).T))
    model.register_buffer("adjacency", torch.eye(8).to_sparse())
    return model


ACTIVATION, LINEAR = nn.ReLU(), nn.Linear(8, 8)
Pair = namedtuple("Pair", ["left", "right"])

CUT: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "nested chains": (
        lambda: chain(nn.Flatten(), chain(nn.Dropout(0.0), nn.Linear(8, 8), chain(nn.Linear(8, 8))), nn.Linear(8, 4)),
        square,
    ),
    "activation shared in a chain": (
        lambda: chain(nn.Linear(8, 8), ACTIVATION, nn.Linear(8, 8), ACTIVATION, nn.Linear(8, 4)),
        square,
    ),
    "layer shared in a chain": (lambda: chain(LINEAR, nn.Tanh(), LINEAR, nn.Tanh(), nn.Linear(8, 4)), square),
    "weights shared by layers": (shared_weights, square),
    "containers of parameters": (parameter_containers, square),
    "weight normalisation": (
        lambda: chain(parametrizations.weight_norm(nn.Linear(8, 8)), parametrizations.weight_norm(nn.Linear(8, 4))),
        square,
    ),
    "straight-through rounding": (lambda: Between(lambda m, x: Rounding.apply(x, 0.01)), square),
    "gradient reversal": (lambda: Between(lambda m, x: Reversal.apply(x)), square),
    "complex numbers": (lambda: Between(lambda m, x: torch.fft.ifft(torch.fft.fft(x) * (1 + 1j)).real), square),
    "complex output": (
        lambda: Net(lambda m, x: torch.fft.fft(m.b(m.a(x)))),
        lambda model: model(rows()).abs().pow(2).mean(),
    ),
    "mixture of experts": (lambda: experts(routed), square),
    "rows ordered by content and back": (lambda: Net(sorted_inside), square),
    "causal mask that is looked at": (encoder, of_tokens),
    "loop over time with state": (
        lambda: Net(recurrent, cell=nn.GRUCell(8, 8)),
        lambda model: model(torch.stack([rows(), rows(seed=4)], 1)).pow(2).mean(),
    ),
    "Python attribute of a tensor": (
        lambda: Net(lambda m, x: m.b(m.a(x)) * x.factor),
        lambda model: model(_with(rows(), factor=2.0)).pow(2).mean(),
    ),
    "sequences packed inside": (
        lambda: Net(packed, lstm=nn.LSTM(8, 8, batch_first=True)),
        lambda model: model(torch.stack([rows(), rows(seed=4)], 1), torch.tensor([1, 2] * 5)).pow(2).mean(),
    ),
    "sparse constant": (sparse_adjacency, square),
    "in-place operations between layers": (lambda: Between(lambda m, x: x.mul_(2).add_(1).relu_()), square),
    "single precision in between": (lambda: Between(lambda m, x: (x * 0).float().double() + x), square),
    "teacher without gradients": (
        lambda: Net(lambda m, x: m.b(m.a(x)) - _without_gradients(m.teacher, x), teacher=nn.Linear(8, 4)),
        square,
    ),
    "checkpoints over a chain": (
        lambda: Net(
            lambda m, x: m.b(checkpoint_sequential(m.net, 2, x, use_reentrant=False)),
            net=chain(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()),
        ),
        lambda model: model(rows().requires_grad_()).pow(2).mean(),
    ),
    "one activation at a kink": (lambda: Net(lambda m, x, kinked: m.b(Kinked.apply(m.a(x), kinked))), first_at_kink),
    "forward called directly": (lambda: Net(lambda m, x: m.b(m.a.forward(x) + m.a(x))), square),
    "rows one by one": (
        lambda: Net(lambda m, x: torch.vmap(lambda row: m.b(torch.tanh(m.a(row))))(x)),
        square,
    ),
    "ensemble": (
        lambda: Net(
            lambda m, x: torch.stack([net(x) for net in m.nets], 1),
            nets=nn.ModuleList(chain(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)),
        ),
        square,
    ),
    "named tuples": (
        lambda: Net(lambda m, pair: Pair(m.b(m.a(pair.left) + pair.right), [pair.left, {"z": None}])),
        lambda model: model(Pair(rows(), rows(seed=4))).left.pow(2).mean(),
    ),
    "what max returns": (lambda: Net(lambda m, x: m.b(m.a(x)).max(1)), lambda model: model(rows()).values.sum()),
    "views, inputs and booleans": (
        lambda: Net(lambda m, x: (m.b(m.a(x)).view(len(x), 2, 2).mT, x, x > 0)),
        lambda model: model(rows())[0].pow(2).sum() + model(rows().requires_grad_())[1].sum(),
    ),
    "keywords only": (
        lambda: Net(lambda m, *, x, mask=None: {"y": m.b(m.a(x) if mask is None else m.a(x) * mask), "n": None}),
        lambda model: model(x=rows())["y"].sum() + model(x=rows(), mask=rows(seed=4))["y"].pow(2).mean(),
    ),
    "similarity to other rows": (
        lambda: Net(lambda m, x, y: m.a(x) @ m.b(y).repeat(1, 2).T),
        lambda model: model(rows(), rows(seed=4)).softmax(1).pow(2).mean(),
    ),
}


def _without_gradients(teacher: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return teacher(x)  # type: ignore[no-any-return]


def queue(model: Any, x: Tensor) -> Tensor:
    """Momentum contrast: an encoder that follows the other one, and a queue of what it gave."""
    with torch.no_grad():
        for slow, fast in zip(model.key.parameters(), model.b.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)
        keys = model.key(x)
    logits = model.b(model.a(x)) @ model.queue.clone()
    model.queue[:, : len(x)] = keys.T
    return logits  # type: ignore[no-any-return]


def momentum_contrast() -> nn.Module:
    model = Net(queue, key=nn.Linear(8, 4))
    model.register_buffer("queue", torch.randn(4, 20))
    return model


def remember_and_forget(model: Any, x: Tensor) -> Tensor:
    model.skip = x
    y = model.c(x) + model.skip
    model.skip = None
    return y  # type: ignore[no-any-return]


def stack_of_skips(model: Any, x: Tensor) -> Tensor:
    model.skips.append(x)
    return model.c(x) + model.skips.pop()  # type: ignore[no-any-return]


def gated(model: Any, x: Tensor) -> Tensor:
    return x + model.gate * (x - x.mean(0))  # type: ignore[no-any-return]


def cut_gradients(model: Any, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient / gradient.norm())
    return x


def forces(model: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        place = x.detach().requires_grad_()
        energy = model.b(torch.tanh(model.a(place)))
        (force,) = torch.autograd.grad(energy.sum(), place, create_graph=model.training)
    return energy, force


def counts_itself(model: Any, x: Tensor) -> Tensor:
    type(model).calls += 1
    return model.b(model.a(x))  # type: ignore[no-any-return]


def in_an_object(model: Any, x: Tensor) -> Tensor:
    model.meter.count += len(x)
    model.stats["rows"].append(len(x))
    return x


def weight_decay_inside(model: Any, x: Tensor) -> Tensor:
    model.a.weight.data.mul_(0.99)
    return x


def minibatch_deviation(model: Any, x: Tensor) -> Tensor:
    return x + x.std(0).mean()


def masked(model: Any, x: Tensor) -> Tensor:
    scores = model.b(model.a(x) - model.a(x).mean(0))
    return scores.masked_fill(torch.tensor([False, False, False, True], device=x.device), -1e9)  # type: ignore[no-any-return]


def trained_otherwise(model: Any, x: Tensor) -> Tensor:
    return model.drop(x - x.mean(0) if model.training else x)  # type: ignore[no-any-return]


def noisy_recomputation(model: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: F.dropout(torch.tanh(x), 1e-9, model.training), x, use_reentrant=False)  # type: ignore[no-any-return]


WHOLE: dict[str, tuple[Callable[[], nn.Module], Loss, str]] = {
    "spectral normalisation": (
        lambda: chain(parametrizations.spectral_norm(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 4))),
        square,
        "its forward changes the buffer '_v' of 1.parametrizations.weight.0",
    ),
    "momentum contrast": (momentum_contrast, square, "its forward changes the parameter"),
    "weights changed by .data": (
        lambda: Between(weight_decay_inside),
        square,
        "its forward changes the parameter 'a.weight'",
    ),
    "embedding with a largest norm": (
        lambda: chain(nn.Embedding(11, 8, max_norm=1.0), nn.Linear(8, 4)),
        of_tokens,
        "its forward changes the parameter '0.weight'",
    ),
    "attribute that is set for a while": (
        lambda: Between(remember_and_forget, c=nn.Linear(8, 8), skip=None),
        square,
        "its forward changes the attribute 'skip' of Between for a while",
    ),
    "list that is used as a stack": (
        lambda: _with(Between(stack_of_skips, c=nn.Linear(8, 8)), skips=[]),
        square,
        "its forward changes the attribute 'skips' of Between for a while",
    ),
    "state in objects and lists of lists": (
        lambda: _with(Between(in_an_object), meter=types.SimpleNamespace(count=0), stats={"rows": []}),
        square,
        "its forward changes the attribute",
    ),
    "counter in the class": (
        lambda: Counting(counts_itself),
        square,
        "its forward changes the attribute 'calls' of class Counting",
    ),
    "batch normalisation in a list": (
        lambda: _with(Between(lambda m, x: m.hidden[0](x)), hidden=[nn.BatchNorm1d(8).double()]),
        square,
        "hidden (BatchNorm1d) uses the mean and variance of the whole batch",
    ),
    "gate that is zero at first": (
        lambda: Between(gated, gate=nn.Parameter(torch.zeros(1))),
        square,
        "the gradients of its rows depend on each other",
    ),
    "backward with a norm of the batch": (
        lambda: Between(lambda m, x: Normalised.apply(x)),
        square,
        "the gradients of its rows depend on each other",
    ),
    "small coupling of gradients": (
        lambda: Between(lambda m, x: Kinked.apply(x, torch.ones(1))),
        square,
        "the gradients of its rows depend on each other",
    ),
    "forces, which are gradients": (
        lambda: Net(forces),
        lambda model: sum(each.pow(2).mean() for each in model(rows())),
        "it computes gradients itself",
    ),
    "hook on a tensor": (lambda: Between(cut_gradients), square, "it calls register_hook of a tensor"),
    "coupling beside huge numbers": (lambda: Net(masked), lambda model: model(rows())[:, :3].pow(2).mean(), COUPLED),
    "coupling in training only": (lambda: Between(trained_otherwise, drop=nn.Dropout(1e-12)), square, COUPLED),
    "deviation of the batch as a feature": (lambda: Between(minibatch_deviation), square, COUPLED),
    "scale of the batch": (
        lambda: Between(lambda m, x: Rounding.apply(x, x.detach().abs().max() / 127)),
        square,
        COUPLED,
    ),
    "rows before others": (lambda: Between(lambda m, x: x + torch.cat([x[:1] * 0, x[:-1]])), square, COUPLED),
    "best rows of the batch": (lambda: Between(lambda m, x: x * (x >= x.topk(3, 0).values[-1])), square, COUPLED),
    "mixed rows": (lambda: Between(lambda m, x: x + x[torch.randperm(len(x))] * 0.1), square, COUPLED),
    "experts with a capacity": (lambda: experts(routed_with_capacity), square, COUPLED),
    "loss of the batch inside": (
        lambda: Net(lambda m, x: F.cross_entropy(m.b(m.a(x)), torch.zeros(len(x), dtype=torch.long))),
        lambda model: model(rows()),
        "an output of shape () does not have the batch as first dimension",
    ),
    "weight as output": (
        lambda: Net(lambda m, x: (m.b(m.a(x)), m.a.weight)),
        lambda model: model(rows())[0].sum(),
        "an output of shape (8, 8) does not have the batch as first dimension",
    ),
    "sparse output": (
        lambda: Net(lambda m, x: m.b(m.a(x)).to_sparse()),
        lambda model: model(rows()).to_dense().pow(2).mean(),
        "an output is sparse, nested or quantized",
    ),
    "bags of tokens": (
        lambda: Net(lambda m, tokens, offsets: m.b(m.a(m.bag(tokens, offsets))), bag=nn.EmbeddingBag(11, 8)),
        lambda model: model(tokens(4).flatten(), torch.arange(0, 24, 3)).pow(2).mean(),
        "it cannot run on a part of the batch (RuntimeError",
    ),
    "random numbers of Python": (
        lambda: Between(lambda m, x: x * random.Random(3).random() + 0 * random.random()),
        square,
        "it draws random numbers from Python's random",
    ),
    "random numbers between layers, recomputed": (
        lambda: Between(noisy_recomputation),
        lambda model: model(rows().requires_grad_()).pow(2).mean(),
        "its code draws random numbers under activation checkpointing",
    ),
    "iterator as input": (
        lambda: Net(lambda m, x, numbers: m.b(m.a(x) + sum(numbers))),
        lambda model: model(rows(), iter([1.0, 2.0])).sum(),
        "it is called with a list_iterator, which cannot be cut",
    ),
}


# They compare random numbers, which are others on the accelerator.
ON_THE_CPU = ("mixed rows", "random numbers between layers, recomputed", "coupling in training only")


def _with(obj: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(obj, name, value)
    return obj


def same_state(both: Any) -> bool:
    """Whether parameters and buffers are those of one device."""
    pairs = zip(both.model.state_dict().values(), both.alone.state_dict().values(), strict=True)
    return all(torch.allclose(a.cpu().to_dense(), b.to_dense(), rtol=0, atol=EXACT) for a, b in pairs)


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut(name: str, pair: Any) -> None:
    make, loss = CUT[name]
    torch.manual_seed(0)
    both = pair(make().double())
    optimizers = [torch.optim.SGD(model.parameters(), 0.05) for model in (both.model, both.alone)]
    for _ in range(3):
        both.step(loss)
        assert both.relative_difference < EXACT
        for optimizer in optimizers:
            optimizer.step()
    assert same_state(both)
    assert both.calls >= 3
    assert both.engine.reasons == []


@pytest.mark.parametrize("name", WHOLE)
def test_what_runs_whole(name: str, pair: Any) -> None:
    make, loss, reason = WHOLE[name]
    torch.manual_seed(0)
    both = pair(make().double(), on="cpu@speed=1,cpu@speed=1" if name in ON_THE_CPU else None)

    def seeded(model: nn.Module) -> Tensor:
        random.seed(1)
        torch.manual_seed(1)
        return loss(model)

    both.step(seeded)
    assert both.relative_difference < EXACT
    assert same_state(both)
    assert both.engine.reasons
    assert all(reason in text for text in both.engine.reasons)
    assert both.calls == 0
