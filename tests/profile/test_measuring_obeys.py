"""Measuring obeys constraints: no batch and no private weight is copied where it must not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import DeviceSpec, Inventory, Link, resolve_devices
from lightning_hetero.placement import Constraints
from lightning_hetero.profile import Curve
from lightning_hetero.profile.benches import Bench
from lightning_hetero.profile.cache import cache_key
from lightning_hetero.profile.fill import fill
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.strategy import first_steps
from lightning_hetero.testing import EmulatedAccelerator

Record = Callable[..., Recording]
SECRET, OF_BATCH = 42.0, 7.0


class Spy(nn.Linear):
    """Writes down on which device which weights and inputs are."""

    seen: set[tuple[str, str]] = set()  # noqa: RUF012 (copies of the unit must write to the same set)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((str(x.device), "something"))
        if float(self.weight.detach().to("cpu")[0, 0]) == SECRET:
            self.seen.add((str(x.device), "secret"))
        if bool((x.detach().to("cpu")[:, 0] == OF_BATCH).all()):
            self.seen.add((str(x.device), "batch"))
        return super().forward(x)


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    Spy.seen.clear()


@pytest.fixture
def model() -> nn.Sequential:
    """Four equal units; the second one is private."""
    made = nn.Sequential(*(Spy(8, 8) for _ in range(4)))
    with torch.no_grad():
        made[1].weight[0, 0] = SECRET
    return made


def batch() -> Tensor:
    return torch.cat([torch.full((8, 1), OF_BATCH), torch.randn(8, 7)], 1)


def test_data_is_measured_where_it_may_be_only(
    model: nn.Sequential, record: Record, accelerator: EmulatedAccelerator
) -> None:
    """Units of one sort share a call; where that call must not be, one is taken that has nothing of the batch."""
    trusted, other, forbidden = "cpu", *accelerator.devices[:2]
    recording = record(model, batch().requires_grad_())
    assert len(recording.samples) == 1
    Spy.seen.clear()

    def may_run(unit: str, device: str) -> bool:
        return device == trusted or (device == other and unit in "23")

    inventory = resolve_devices([trusted, other, forbidden])
    profile = measure_model(recording, inventory, budget_s=60.0, may_run=may_run)

    assert Spy.seen == {("cpu", "something"), ("cpu", "secret"), ("cpu", "batch"), (other, "something")}
    assert set(profile["0"].forward_s) == {trusted, other, forbidden}
    notes = [note for note in profile.notes if "constraints" in note]
    assert notes == [f"Unit '0' (and 3 like it) is estimated on {forbidden}: constraints keep it from there."]


def test_without_rules_everything_is_measured_everywhere(
    model: nn.Sequential, record: Record, accelerator: EmulatedAccelerator
) -> None:
    recording = record(model, batch())
    measure_model(recording, resolve_devices(["cpu", accelerator.devices[0]]), budget_s=60.0)
    assert (accelerator.devices[0], "batch") in Spy.seen


@pytest.mark.parametrize("what", ["trusted", "private", "forbidden"])
def test_a_run_measures_under_its_constraints(
    model: nn.Sequential,
    record: Record,
    accelerator: EmulatedAccelerator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    what: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(first_steps, "MEASURE_S", 60.0)
    other = accelerator.devices[0]
    rules: dict[str, Any] = {"forbidden": (other,)} if what == "forbidden" else {"trusted": ("cpu",)}
    rules |= {"private": ("1",)} if what == "private" else {}
    recording, inventory = record(model, batch()), resolve_devices(["cpu", other])
    Spy.seen.clear()

    first_steps._profile_of(recording, inventory, Constraints(**rules))

    expected = {"trusted": {"something", "secret"}, "private": {"something"}, "forbidden": set()}
    assert {seen for device, seen in Spy.seen if device == other} <= expected[what]
    assert bool(expected[what]) == ((other, "something") in Spy.seen)


def test_numbers_of_forbidden_devices_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of the root, which runs the model's own code."""
    devices = tuple(DeviceSpec(name=n, kind="x", torch_device=n, memory_bytes=1, speed=3.0) for n in ("a", "b", "c"))
    links = (Link(source="a", target="b"), Link(source="c", target="a"))
    seen = []

    def measured(inventory: Inventory, **_: Any) -> Inventory:
        seen.append(inventory)
        return inventory

    monkeypatch.setattr(first_steps, "measured_inventory", measured)
    inventory = Inventory(devices=devices, links=links, host="here")
    found = first_steps._measured(inventory, ("a", "b"), None)

    assert [device.name for device in seen[0]] == ["a", "c"]
    assert seen[0].links == links[1:]
    assert found.devices == devices
    assert set(found.links) == set(links)


def test_a_bench_that_shares_no_sort_with_another_is_estimated_by_their_speeds() -> None:
    cpu, gpu = Bench("cpu"), Bench("gpu")
    pair = (Curve(((1, 1.0), (8, 8.0))), Curve(((1, 2.0), (8, 16.0))))
    full = fill({"a": {cpu: pair}, "b": {}}, {"a": 1.0, "b": 1.0}, (cpu, gpu), 8, {cpu: 1.0, gpu: 4.0})
    assert full is not None
    assert (full["a"][gpu][0](8), full["b"][gpu][1](8)) == (2.0, 4.0)


class Plain(nn.Module):
    """Two equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x))
        return made


class Skip(Plain):
    """The same calls, with the batch added in between."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x) + x)
        return made


class Kept(Plain):
    """The same flows, of which own code keeps more."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x)).exp().tanh()
        return made


def test_the_cache_knows_what_passes_between_units_and_what_must_not_be_measured(
    record: Record, cpus: Inventory
) -> None:
    x = torch.randn(8, 4)

    def recorded(model: nn.Module) -> Recording:
        with Recording(model, record(model, x).graph) as recording:
            recording.ends_in(model(x).sum())
        return recording

    def key(recording: Recording, **more: Any) -> dict[str, Any]:
        return cache_key(recording, cpus, rows=8, training=True, **more)

    plain = key(recorded(Plain()))
    assert plain == key(recorded(Plain())) == key(recorded(Plain()), may_run=lambda unit, device: True)
    assert plain != key(recorded(Plain()), may_run=lambda unit, device: device == "emulated:0")
    for other in (Skip, Kept):
        changed = key(recorded(other()))
        assert changed["calls"] == plain["calls"]
        assert changed["between"] != plain["between"]
