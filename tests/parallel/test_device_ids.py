"""Every way to write the devices of a plain PyTorch program."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_hetero.testing.models import MLP


def places(model: Any) -> dict[str, str]:
    """Where torch says that the weight of each layer is, by name of the layer."""
    return {name: str(layer.weight.device) for name, layer in model.module.named_children()}


@pytest.mark.parametrize(
    ("make_ids", "expected"),
    [
        (lambda: [0, 1], ["dev:0", "dev:0", "dev:1"]),
        (lambda: (1, 0), ["dev:1", "dev:1", "dev:0"]),
        (lambda: range(2), ["dev:0", "dev:0", "dev:1"]),
        (lambda: [np.int64(1)], ["dev:1", "dev:1", "dev:1"]),
        (lambda: ["dev:1", "cpu"], ["dev:1", "dev:1", "cpu"]),
        (lambda: "dev:1,cpu", ["dev:1", "dev:1", "cpu"]),
        (lambda: "dev:*", ["dev:0", "dev:0", "dev:1"]),
        (lambda: [torch.device("cpu"), torch.device("dev", 1)], ["cpu", "cpu", "dev:1"]),
        (lambda: [torch.device("dev:1"), "cpu", 0], ["dev:1", "cpu", "dev:0"]),
        (lambda: [0, {"name": "cpu"}], ["dev:0", "dev:0", "cpu"]),
        (lambda: ["cpu"], ["cpu", "cpu", "cpu"]),
    ],
)
def test_numbers_texts_and_devices_of_torch_may_be_mixed(
    make_ids: Callable[[], Any], expected: list[str], spread: Any
) -> None:
    model = spread(MLP(), device_ids=make_ids())
    assert places(model) == dict(zip(["first", "second", "third"], expected, strict=True))
    assert str(model.output_device) == expected[0]
    assert str(model(torch.ones(2, 8)).device) == expected[0]


@pytest.mark.parametrize("request_", [None, "auto"])
def test_without_a_list_all_devices_of_the_machine_are_taken(request_: str | None, spread: Any) -> None:
    names = spread(MLP(), device_ids=request_).plan.inventory.names
    assert {"dev:0", "dev:1", "cpu"} <= {*names}


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        (None, ("dev:0", "dev:1")),
        ("auto", ("dev:0", "dev:1")),
        ("dev", ("dev:0", "dev:1")),
        ("cpu", ("cpu:0", "cpu:1")),
        ("gloo", ("cpu:0", "cpu:1")),
        ("mpi", ("cpu:0", "cpu:1")),
    ],
)
def test_the_backend_says_of_what_kind_the_numbered_devices_are(
    backend: str | None, names: tuple[str, ...], spread: Any
) -> None:
    model = spread(MLP(), device_ids=[0, 1], backend=backend)
    assert [stage.device for stage in model.plan.stages] == [*names]
    assert {device.emulated for device in model.plan.inventory} == {names[0].startswith("cpu")}


def test_the_backend_does_not_touch_devices_that_have_names(spread: Any) -> None:
    model = spread(MLP(), device_ids=[0, "dev:1"], backend="gloo")
    assert [stage.device for stage in model.plan.stages] == ["cpu:0", "dev:1"]


def test_emulated_devices_have_speed_and_memory_of_their_own(spread: Any) -> None:
    model = spread(MLP(), device_ids=["cpu@speed=1,mem=1GiB", "cpu@speed=0.5,mem=2GiB,name=slow"])
    assert {d.name: (d.speed, d.memory_bytes >> 30) for d in model.plan.inventory} == {
        "emulated:0": (1.0, 1),
        "slow": (0.5, 2),
    }
    assert model(torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.parametrize(("backend", "kind"), [(None, "dev"), ("gloo", "cpu")])
def test_numbers_mean_the_same_in_placement_and_memory(backend: str | None, kind: str, spread: Any) -> None:
    model = spread(MLP(), device_ids=[0, 1], backend=backend, placement={"first": 1, "": 0}, memory={1: "5KiB"})
    assert model.plan.device_of == {"first": f"{kind}:1", "second": f"{kind}:0", "third": f"{kind}:0"}
    assert model.plan.inventory[f"{kind}:1"].memory_bytes == 5 << 10


def test_more_devices_than_parts_leave_the_last_ones_idle_and_say_so(spread: Any) -> None:
    model = spread(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), device_ids=["cpu", 0, 1])
    assert [(stage.device, stage.units) for stage in model.plan.stages] == [("cpu", ("0",)), ("dev:0", ("1",))]
    assert model.plan.notes == ("Units are shared out evenly over 2 of 3 devices, whatever their speed.",)


def test_a_module_without_parts_stands_on_the_first_device(spread: Any) -> None:
    model = spread(nn.Linear(8, 4), device_ids=[1, "cpu"])
    assert str(model.module.weight.device) == str(model(torch.ones(2, 8)).device) == "dev:1"


def test_on_a_machine_without_accelerator_numbers_need_a_backend(
    run_python: Callable[..., CompletedProcess[str]],
) -> None:
    program = """
from torch import nn
from lightning_hetero import InventoryError, ModelParallel, ModelParallelConfig

def stages(**options):
    with ModelParallel(ModelParallelConfig(model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **options)) as model:
        return [stage.device for stage in model.plan.stages]

print(stages(device_ids=[0, 1], backend="cpu"), stages())
try:
    stages(device_ids=["cpu", 1])
except InventoryError as error:
    print(error)
"""
    ran = run_python("-c", program, CUDA_VISIBLE_DEVICES="")
    assert ran.stdout.splitlines() == [
        "['cpu:0', 'cpu:1'] ['cpu']",
        "device 1 means accelerator number 1, and this machine has none. Write 'cpu', or backend='cpu' to let the CPU "
        "play several devices.",
    ], ran.stderr
