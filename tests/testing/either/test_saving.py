"""Tensors and modules survive files, pickles and copies, here and on other devices."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.testing import EmulatedAccelerator


def through_a_file(thing: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def test_a_tensor_comes_back_to_its_device(device: str) -> None:
    tensor = torch.arange(6, dtype=torch.float64, device=device).reshape(2, 3)
    loaded = through_a_file({"x": tensor, "view": tensor[1]})
    assert str(loaded["x"].device) == str(loaded["view"].device) == device
    assert torch.equal(loaded["x"], tensor)
    loaded["x"][1, 0] = 9.0
    assert loaded["view"][0].item() == 9.0  # what shared memory shares it again


@pytest.mark.parametrize("to", ["cpu", "dev:0", "dev:1"])
@pytest.mark.parametrize("as_function", [False, True])
def test_map_location_chooses_the_device(device: str, to: str, as_function: bool) -> None:
    location: Any = (lambda storage, _: storage if to == "cpu" else storage.dev(int(to[-1]))) if as_function else to
    if as_function and to != "cpu":
        location = {device: to}
    loaded = through_a_file(torch.ones(3, device=device), map_location=location)
    assert str(loaded.device) == to
    assert loaded.tolist() == [1.0] * 3


def test_a_tensor_of_the_cpu_loads_onto_a_device(device: str) -> None:
    assert str(through_a_file(torch.ones(3), map_location=device).device) == device
    assert str(through_a_file(torch.ones(3), map_location=torch.device(device)).device) == device


def test_a_module_and_its_optimizer_come_back(accelerator: EmulatedAccelerator, tmp_path: Path) -> None:
    first, second = accelerator.devices
    model = nn.Sequential(nn.Linear(3, 4).to(first), nn.BatchNorm1d(4).to(second))
    optimizer = torch.optim.Adam(model.parameters())
    model[1](model[0](torch.randn(5, 3, device=first)).to(second)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")

    there = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert [str(value.device) for value in there["model"].values()] == [first] * 2 + [second] * 5
    for name, value in model.state_dict().items():
        assert torch.equal(there["model"][name], value)
    assert str(there["optimizer"]["state"][0]["exp_avg"].device) == first

    on_host = torch.load(tmp_path / "saved.pt", weights_only=True, map_location="cpu")
    assert {value.device.type for value in on_host["model"].values()} == {"cpu"}
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).to(first))
    other.load_state_dict(there["model"])  # from device to host, and from device to device
    assert torch.equal(other[0].weight, model[0].weight.cpu())
    assert torch.equal(other[1].running_mean.cpu(), model[1].running_mean.cpu())


def test_whole_modules_pickle(device: str) -> None:
    model = nn.Linear(3, 2).to(device)
    for loaded in (pickle.loads(pickle.dumps(model)), through_a_file(model, weights_only=False), copy.deepcopy(model)):
        assert str(loaded.weight.device) == device
        assert torch.equal(loaded.weight, model.weight)
        assert loaded.weight.data_ptr() != model.weight.data_ptr()


def test_a_state_dict_travels_by_copy(device: str) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2).to(device)
    target.load_state_dict(source.state_dict())
    assert str(target.weight.device) == device
    assert torch.equal(target.weight.cpu(), source.weight)
    target = nn.Linear(3, 2, device="meta")
    target.load_state_dict({name: value.to(device) for name, value in source.state_dict().items()}, assign=True)
    assert str(target.weight.device) == device


def test_a_device_that_is_gone_is_named_when_loading(device: str, tmp_path: Path) -> None:
    torch.save(torch.ones(2, device=device), tmp_path / "saved.pt")
    with pytest.raises((RuntimeError, AssertionError), match=r"dev|device"):
        torch.load(tmp_path / "saved.pt", map_location="dev:7")
