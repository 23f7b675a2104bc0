"""A run that was recorded and measured first is the run that was not, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.testing import EmulatedAccelerator

pytestmark = pytest.mark.usefixtures("quick_measuring")  # what it leaves is asked for here
Look = Callable[[nn.Module], dict[str, Any]]
WIDTH, TIME, ROWS = 6, 4, 6


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class Norms(nn.Module):
    """BatchNorm over all rows and times, and a buffer that user code counts in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.counter = Counts()

    def forward(self, x: Tensor) -> Tensor:
        return self.counter(self.norm(x.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


class Counts(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.scale * random.uniform(0.9, 1.1)


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Returns()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(hidden={"x": x})["y"]  # type: ignore[no-any-return]


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(self, hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": F.dropout(hidden["x"] @ self.weight, 0.2, self.training)}


BLOCKS: tuple[Callable[[], nn.Module], ...] = (
    Attends,
    Recurs,
    Norms,
    Dicts,
    lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH)),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True),
    lambda: nn.Linear(WIDTH, WIDTH),
)


class Random(nn.Module):
    """Some blocks in some order, one of them called twice, between an embedding and a head that is tied to it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.embed = nn.Embedding(9, WIDTH)
        self.blocks = nn.ModuleList(draw.choice(BLOCKS)() for _ in range(4))
        self.again = draw.randrange(4)
        self.head = nn.Linear(WIDTH, 9, bias=False)
        if draw.random() < 0.5:
            self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(draw.random() < 0.8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[self.again](x))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def three_steps(model: Random, batches: list[Tensor], first: Callable[[], Tensor]) -> list[Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = first() if i == 0 else model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.fixture
def inventory(request: pytest.FixtureRequest) -> Iterator[Inventory]:
    if request.param == "emulated":
        yield resolve_devices("cpu@speed=2,cpu@speed=1,threads=1")
        return
    accelerator: EmulatedAccelerator = request.getfixturevalue("accelerator")
    accelerator.reset()
    yield resolve_devices(f"cpu,{','.join(accelerator.devices)}")
    accelerator.reset()


@pytest.mark.parametrize(
    ("seed", "inventory"),
    [(seed, ("emulated", "accelerator")[seed % 2]) for seed in range(20)],
    indirect=["inventory"],
)
def test_a_measured_model_trains_as_if_nobody_had_looked(seed: int, inventory: Inventory, look: Look) -> None:
    torch.manual_seed(seed)
    model = Random(seed)
    alone = copy.deepcopy(model)
    batches = [torch.randint(9, (ROWS, TIME)) for _ in range(3)]
    graph = find_units(model)

    def watched() -> Tensor:
        with Recording(model, graph) as recording:
            loss = model.loss(batches[0])
        before = look(model)
        profile = measure_model(recording, inventory, training=True)
        assert look(model) == before
        assert set(profile.devices) == set(inventory.names)
        assert profile.notes == ()
        return loss

    torch.manual_seed(5)
    random.seed(5)
    losses = three_steps(model, batches, watched)
    with_a_look = look(model)
    torch.manual_seed(5)
    random.seed(5)
    expected = three_steps(alone, batches, lambda: alone.loss(batches[0]))
    without = look(alone)

    assert losses == expected
    assert {**with_a_look, "identity": 0} == {**without, "identity": 0}


def test_random_numbers_of_an_accelerator_go_on_as_before(accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    inventory = resolve_devices(accelerator.devices[0])
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 4, dropout=0.5, batch_first=True))
    module = torch.get_device_module(accelerator.name)
    before = [state.tolist() for state in module.get_rng_state_all()]
    with Recording(model, find_units(model)) as recording:
        model(torch.randn(4, 3, 4))
    profile = measure_model(recording, inventory)

    assert profile.devices == (accelerator.devices[0],)
    assert [state.tolist() for state in module.get_rng_state_all()] == before


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "old spectral_norm", "pruned"],
)
def test_layers_with_computed_weights(wrap: Callable[[nn.Module], nn.Module], look: Look) -> None:
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4)))
    x = torch.randn(8, 4)
    with Recording(model, find_units(model)) as recording:
        loss = model(x).sum()
    before = look(model)
    profile = measure_model(recording, resolve_devices("cpu"))

    assert profile.notes == ()
    assert look(model) == before
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_where_tensors_are_made_by_default_does_not_matter(accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with Recording(model, find_units(model)) as recording:
        model(torch.randn(4, 4))
    with torch.device(accelerator.devices[0]):
        profile = measure_model(recording, resolve_devices("cpu"), rows=8)

    assert profile.notes == ()


def test_hooks_of_user_code_do_not_see_the_measuring() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model[0].register_full_backward_hook(lambda module, given, got: seen.append("backward"))
    next(model.parameters()).register_hook(lambda gradient: seen.append("gradient"))
    everywhere = register_module_forward_hook(lambda module, args, output: seen.append("everywhere"))
    try:
        with Recording(model, find_units(model)) as recording:
            model(torch.randn(4, 4))
        as_called = list(seen)
        profile = measure_model(recording, resolve_devices("cpu"))
        model(torch.randn(4, 4))
    finally:
        everywhere.remove()

    assert profile.notes == ()
    assert as_called == ["pre", "everywhere", "everywhere", "everywhere"]
    assert seen == as_called * 2


def test_measuring_within_the_modes_of_user_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.inference_mode():
        with Recording(model, find_units(model)) as recording:
            model(torch.randn(4, 4))
        profile = measure_model(recording, resolve_devices("cpu"))
        assert torch.is_inference_mode_enabled()
    assert profile.notes == ()
    assert profile["0"].backward_s["cpu"].points[-1][1] > 0
