"""Predicted memory against the counters of the emulated accelerator: near, and never too little."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.plan.forecast import Execution
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.simulate import Costs, predict
from lightning_hetero.testing import EmulatedAccelerator
from lightning_hetero.testing.models import Convolutions

pytestmark = pytest.mark.usefixtures("quick_measuring")  # bytes are asked for here
ROWS, WIDTH = 128, 64
SMALL_BYTES = 2048  # numbers and the like, which nobody predicts


LAYERS = {
    "convolutions": lambda: [Convolutions()],
    "linear": lambda: [nn.Linear(WIDTH, WIDTH)],
    "relu": lambda: [nn.Linear(WIDTH, WIDTH), nn.ReLU()],
    "gelu": lambda: [nn.Linear(WIDTH, WIDTH), nn.GELU()],
    "block": lambda: [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))],
    "norm": lambda: [nn.LayerNorm(WIDTH), nn.Dropout(0.1)],
}


class Residual(nn.Module):
    """Units called by code of the model's own: a residual stream on the root. Input (rows, WIDTH)."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer for index, layer in enumerate(layers)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + layer(x)
        return x


@pytest.fixture
def devices(accelerator: EmulatedAccelerator) -> Iterator[EmulatedAccelerator]:
    accelerator.reset()
    yield accelerator
    accelerator.reset()


def peaks(
    model: nn.Module, device_of: dict[str, str], execution: Execution, accelerator: EmulatedAccelerator
) -> dict[str, int]:
    """The most that three steps of Adam took on each device, beyond what lay there before."""
    inventory = resolve_devices(",".join(accelerator.devices))
    module = torch.get_device_module(accelerator.name)
    gc.collect()
    before = []
    for index in range(accelerator.device_count):
        module.reset_peak_memory_stats(index)
        before.append(accelerator.stats(index).used_bytes)
    plan = make_plan(ManualPolicy(device_of), Problem(graph=find_units(model), inventory=inventory))
    placed = PlacedModel(model, plan, Pipelining(micro_batches=execution.micro_batches))
    placed.place()
    reconciler = placed.reconciler()
    if reconciler is not None:
        activate(reconciler)
    try:
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            loss = model(torch.ones(ROWS, WIDTH, device=accelerator.devices[0])).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {
            name: accelerator.stats(index).peak_bytes - before[index] for index, name in enumerate(accelerator.devices)
        }
    finally:
        if reconciler is not None:
            deactivate(reconciler)
        placed.release(torch.device("cpu"))


def predicted(
    model: nn.Module, device_of: dict[str, str], execution: Execution, accelerator: EmulatedAccelerator
) -> dict[str, int]:
    graph = find_units(model)
    with Recording(model, graph) as recording:
        recording.ends_in(model(torch.ones(ROWS, WIDTH)).square().sum())
    inventory = resolve_devices(",".join(accelerator.devices))
    costs = Costs(graph, inventory, measure_model(recording, inventory), accumulates=False)
    forecast = predict(costs, device_of, execution).forecast
    return {device.device: device.memory_bytes for device in forecast.devices}


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=5),
    chain=st.booleans(),
    micro_batches=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_no_plan_takes_more_than_predicted(
    kinds: list[str], chain: bool, micro_batches: int, data: st.DataObject, devices: EmulatedAccelerator
) -> None:
    layers = [layer for kind in kinds for layer in LAYERS[kind]()]
    model = nn.Sequential(*layers) if chain else Residual(layers)
    names = find_units(model).names
    cut = data.draw(st.integers(0, len(names)))
    order = data.draw(st.permutations(devices.devices[:2]))
    device_of = {name: order[index >= cut] for index, name in enumerate(names)}
    cuts = micro_batches > 1
    execution = Execution(micro_batches=micro_batches, schedule="forward" if cuts else "whole")
    expected = predicted(model, device_of, execution, devices)
    found = peaks(model, device_of, execution, devices)
    for name, peak in found.items():
        assert peak <= expected.get(name, 0) + SMALL_BYTES


def test_inputs_of_a_unit_go_when_its_backward_is_over(devices: EmulatedAccelerator) -> None:
    """And not with the micro-batch: its gradients may still be on their way while the next one is at work."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Convolutions())
    *near, far = find_units(model).names
    device_of = {**dict.fromkeys(near, devices.devices[0]), far: devices.devices[1]}
    execution = Execution(micro_batches=2, schedule="forward")
    expected = predicted(model, device_of, execution, devices)[devices.devices[1]]
    for _ in range(4):  # which of two threads is faster is a matter of luck
        assert peaks(model, device_of, execution, devices)[devices.devices[1]] <= expected + SMALL_BYTES


@pytest.mark.parametrize("kinds", [["gelu", "norm"], ["norm", "norm"]], ids=" ".join)
def test_normalisation_and_dropout_at_the_end_of_the_root(kinds: list[str], devices: EmulatedAccelerator) -> None:
    model = nn.Sequential(*(layer for kind in kinds for layer in LAYERS[kind]()))
    device_of = dict.fromkeys(find_units(model).names, devices.devices[0])
    expected = predicted(model, device_of, Execution(), devices)[devices.devices[0]]
    assert peaks(model, device_of, Execution(), devices)[devices.devices[0]] <= expected + SMALL_BYTES


@pytest.mark.parametrize(
    "kinds",
    [["relu"] * 4, ["linear", "gelu", "linear"], ["block", "norm", "block"], ["convolutions"] * 2],
    ids=" ".join,
)
def test_a_whole_step_takes_what_is_predicted(kinds: list[str], devices: EmulatedAccelerator) -> None:
    model = nn.Sequential(*(layer for kind in kinds for layer in LAYERS[kind]()))
    device_of = dict.fromkeys(find_units(model).names, devices.devices[0])
    expected = predicted(model, device_of, Execution(), devices)[devices.devices[0]]
    found = peaks(model, device_of, Execution(), devices)[devices.devices[0]]
    # Gradients may be there from the batch before, in the forward and where they are accumulated.
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    assert found - SMALL_BYTES <= expected <= 1.1 * found + gradients
