from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.find import find_units
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.profile import Line, ModelProfile, estimate_profile
from lightning_hetero.profile.shapes import shapes_only
from lightning_hetero.testing.inventories import inventory_of
from lightning_hetero.testing.models import MODELS, ConvNet

ROWS = 6


def graph_of(*sizes_bytes: int) -> ModelGraph:
    return ModelGraph(
        units=tuple(
            Unit(
                name=f"u{i}",
                kind="Linear",
                parameters=size // 4,
                parameter_bytes=size,
                trainable_bytes=size,
                buffer_bytes=0,
                tied_to=f"u{i}",
            )
            for i, size in enumerate(sizes_bytes)
        )
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**10), min_size=1, max_size=5), st.integers(1, 1000), st.booleans())
def test_estimates_need_sizes_only_and_rise_with_the_rows(sizes_bytes: list[int], rows: int, training: bool) -> None:
    profile = estimate_profile(graph_of(*sizes_bytes), inventory_of("cuda:0", "cpu"), rows=rows, training=training)

    assert profile.estimated
    assert profile.notes
    assert profile.rows == rows
    assert profile.devices == ("cpu", "cuda:0")
    assert ModelProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    for unit, size in zip(profile.units, sizes_bytes, strict=True):
        curve = unit.forward_s["cpu"]
        assert curve(rows + 1) > curve(rows) if size else curve(rows) == 0
        assert bool(unit.backward_s) == training


def test_seconds_are_in_proportion_to_bytes_and_speed() -> None:
    cpu = inventory_of("cpu").root
    inventory = Inventory(devices=(cpu, replace(cpu, name="fast", torch_device="cuda:0", speed=4.0)))
    small, large = estimate_profile(graph_of(400, 4000), inventory, rows=8).units

    assert large.forward_s["cpu"](8) == pytest.approx(10 * small.forward_s["cpu"](8))
    assert large.forward_s["fast"](8) == pytest.approx(large.forward_s["cpu"](8) / 4)
    assert large.backward_s["cpu"](8) == pytest.approx(2 * large.forward_s["cpu"](8))


def test_a_frozen_unit_passes_gradients_on_only() -> None:
    graph = graph_of(400)
    graph = replace(graph, units=(replace(graph.units[0], trainable_bytes=0),))
    (unit,) = estimate_profile(graph, inventory_of("cpu"), rows=8).units

    assert unit.backward_s == unit.forward_s


def test_data_sheets_come_before_speeds() -> None:
    device = DeviceSpec(
        name="gpu",
        kind="cuda",
        torch_device="cuda:0",
        memory_bytes=2**30,
        flops_per_s=(("bfloat16", 8e12), ("float32", 1e12)),
        memory_bytes_per_s=1e12,
        launch_s=1e-3,
        measured="data sheet",
    )
    profile = estimate_profile(graph_of(4_000_000), Inventory(devices=(device,)), rows=100)

    # 1e6 parameters, 2 operations each, 100 rows, at 1e12 a second; read once at 1e12 bytes a second; started once.
    assert profile["u0"].forward_s["gpu"](100) == pytest.approx(2e6 * 100 / 1e12 + 4e6 / 1e12 + 1e-3)
    assert profile.optimizer_s_per_byte["gpu"] == pytest.approx(7 / 1e12)


def test_rows_below_one() -> None:
    with pytest.raises(ProfileError, match="rows must be at least 1, got 0"):
        estimate_profile(graph_of(4), inventory_of("cpu"), rows=0)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_alone_tell_calls_and_flows(name: str) -> None:
    make, draw = MODELS[name]
    model = make().double()
    x = draw(ROWS, torch.Generator().manual_seed(0))
    graph = find_units(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()

    recording = shapes_only(model, graph, (x,))

    assert recording.shapes_only
    assert recording.rows == ROWS
    profile = estimate_profile(
        graph,
        inventory_of("cuda:0", "cpu"),
        rows=ROWS,
        flows=recording.flows,
        calls=[call.unit for call in recording.calls],
    )
    assert [unit.name for unit in profile.units] == [call.unit for call in recording.calls]
    assert profile.flows == recording.flows != ()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_on_meta_has_shapes_too() -> None:
    model = ConvNet().to("meta")
    recording = shapes_only(model, find_units(model), (torch.empty(ROWS, 1, 8, 8, device="meta"),))

    (flow,) = (flow for flow in recording.flows if flow.target == "features.1")
    assert flow.size_bytes == Line(0.0, 4 * 8 * 8 * 4)
    assert flow.chained


def test_fake_tensors_are_those_of_real_code() -> None:
    """Code that makes tensors of its own gets along with them."""

    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + torch.arange(4) * torch.ones(4))  # type: ignore[no-any-return]

    model = Makes()

    assert shapes_only(model, find_units(model), (torch.randn(ROWS, 4),)).calls[0].inputs[0].shape == (ROWS, 4)


def test_code_that_looks_at_values_needs_values() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum().item() > 0 else x  # type: ignore[no-any-return]

    model = Looks()
    with pytest.raises(ProfileError, match=r"Looks cannot be called on shapes alone: .* Record a call on a real batch"):
        shapes_only(model, find_units(model), (torch.randn(ROWS, 4),))


def test_lazy_modules_have_no_shapes_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ProfileError, match="Sequential cannot be called on shapes alone: ValueError"):
        shapes_only(model, find_units(model), (torch.randn(ROWS, 4),))
