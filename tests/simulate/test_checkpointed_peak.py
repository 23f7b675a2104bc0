"""Predicted memory with activation checkpointing against the counters of the emulated accelerator."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.plan import Execution
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.runtime.layers import layers_of
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.simulate import Costs, predict
from lightning_hetero.simulate.rerun import pieces_to_rerun
from lightning_hetero.testing import EmulatedAccelerator

pytestmark = pytest.mark.usefixtures("quick_measuring")  # seconds are only compared with what was measured
ROWS, WIDTH = 128, 64
SMALL_BYTES = 2048  # numbers and the like, which nobody predicts


class Residual(nn.Module):
    """Own code after the last unit, which runs again too. Input (rows, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.act, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.drop(self.down(self.act(self.up(self.norm(x)))))
        return x + inner


class Functional(nn.Module):
    """Own code between the units, and at the end. Input (rows, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.down(torch.relu(self.up(x)).exp().sigmoid())
        return torch.tanh(inner)


class Scaled(nn.Module):
    """Own code is the only one that looks at the input, and makes what the first unit takes. Input (rows, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.down(self.up(x * 0.5))
        return x + inner


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Sigmoid(), nn.Linear(2 * WIDTH, WIDTH))


def encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)


MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "chains": lambda: [chain() for _ in range(6)],
    "residual": lambda: [Residual() for _ in range(6)],
    "functional": lambda: [nn.Linear(WIDTH, WIDTH), *(Functional() for _ in range(5)), nn.Linear(WIDTH, WIDTH)],
    "scaled": lambda: [Scaled() for _ in range(8)],
    "encoder": lambda: [encoder() for _ in range(4)],
}


def batch_of(kind: str) -> tuple[int, ...]:
    return (ROWS, 8, WIDTH) if kind == "encoder" else (ROWS, WIDTH)


def measured(model: nn.Module, shape: tuple[int, ...], accelerator: EmulatedAccelerator) -> Costs:
    graph = find_units(model)
    with Recording(model, graph) as recording:
        recording.ends_in(model(torch.ones(shape)).square().sum())
    inventory = resolve_devices(",".join(accelerator.devices))
    return Costs(graph, inventory, measure_model(recording, inventory))


def peaks(
    model: nn.Module,
    shape: tuple[int, ...],
    device_of: dict[str, str],
    micro_batches: int,
    checkpointed: Sequence[str],
    accelerator: EmulatedAccelerator,
    accumulate: int = 1,
) -> tuple[dict[str, int], list[str]]:
    """The most that three steps of Adam took on each device, and what ran again.

    Args:
        accumulate: Batches of which gradients are added up for a step.
    """
    inventory = resolve_devices(",".join(accelerator.devices))
    module = torch.get_device_module(accelerator.name)
    gc.collect()
    before = []
    for index in range(accelerator.device_count):
        module.reset_peak_memory_stats(index)
        before.append(accelerator.stats(index).used_bytes)
    plan = make_plan(ManualPolicy(device_of), Problem(graph=find_units(model), inventory=inventory))
    placed = PlacedModel(model, plan.with_checkpointing(checkpointed), Pipelining(micro_batches=micro_batches))
    placed.place()
    units = set(checkpointed)
    blocks = [b for b in placed.layout.blocks if any(f"{unit}.".startswith(f"{b.name}.") for unit in units)]
    layers = [layer for block in blocks for layer in layers_of(model, block.name)]
    reconciler = placed.reconciler()
    if reconciler is not None:
        activate(reconciler)
    try:
        optimizer = torch.optim.Adam(model.parameters())
        for batch in range(3 * accumulate):
            loss = model(torch.ones(shape, device=accelerator.devices[0])).square().sum()
            if batch % accumulate == 0:
                optimizer.zero_grad()
            loss.backward()
            if (batch + 1) % accumulate == 0:
                optimizer.step()
            del loss
        found = enumerate(accelerator.devices)
        return {name: accelerator.stats(index).peak_bytes - before[index] for index, name in found}, layers
    finally:
        if reconciler is not None:
            deactivate(reconciler)
        placed.release(torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_no_checkpointed_plan_takes_more_than_predicted(kind: str, accelerator: EmulatedAccelerator) -> None:
    accelerator.reset()
    model, shape = nn.Sequential(*MODELS[kind]()), batch_of(kind)
    costs = measured(model, shape, accelerator)
    names, (first, second) = costs.graph.names, accelerator.devices[:2]
    half = len(model) // 2
    split = {name: first if int(name.split(".")[0]) < half else second for name in names}
    cases = [
        (dict.fromkeys(names, first), {first}),
        (dict.fromkeys(names, second), {second}),
        (split, {first, second}),
        (split, {second}),
    ]
    for (device_of, chosen), micro_batches in product(cases, (1, 4)):
        checkpointed = [name for name in names if device_of[name] in chosen]
        execution = Execution(micro_batches=micro_batches, schedule="forward" if micro_batches > 1 else "whole")
        expected = predict(costs, device_of, execution, checkpointed=checkpointed).forecast
        found, layers = peaks(model, shape, device_of, micro_batches, checkpointed, accelerator)
        pieces = pieces_to_rerun(costs, device_of, checkpointed)
        assert len(pieces) == len(layers)
        for device in expected.devices:
            assert found[device.device] <= device.memory_bytes + SMALL_BYTES


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_predicted_savings_are_real(kind: str, accelerator: EmulatedAccelerator) -> None:
    """A prediction does not know whether gradients are accumulated, and has to hold where those of before are there."""
    accelerator.reset()
    model, shape = nn.Sequential(*MODELS[kind]()), batch_of(kind)
    costs = measured(model, shape, accelerator)
    names, device = costs.graph.names, accelerator.devices[1]
    device_of = dict.fromkeys(names, device)
    plain, again = (predict(costs, device_of, Execution(), checkpointed=chosen).forecast for chosen in ((), names))
    (plain_bytes, again_bytes) = (forecast.devices[1].memory_bytes for forecast in (plain, again))
    measured_plain, measured_again = (
        peaks(model, shape, device_of, 1, chosen, accelerator, accumulate=2)[0][device] for chosen in ((), names)
    )
    assert 0 < plain_bytes - again_bytes <= (measured_plain - measured_again) * 1.1
    assert measured_again - SMALL_BYTES <= again_bytes <= 1.1 * measured_again
    assert again_bytes <= 1.2 * peaks(model, shape, device_of, 1, names, accelerator)[0][device]
    forward_s = sum(costs.seconds(ROWS).forward_s[1])
    assert again.step_s == pytest.approx(plain.step_s + forward_s)
