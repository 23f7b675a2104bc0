"""What is counted on shapes alone: operations to start, and modules that mix rows."""

from __future__ import annotations

import torch
from torch import nn

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile.count import count_work

DEVICE = DeviceSpec(
    name="gpu",
    kind="cuda",
    torch_device="cuda:0",
    memory_bytes=2**30,
    flops_per_s=(("float32", 1e15),),
    memory_bytes_per_s=1e15,
    launch_s=1e-3,
    measured="data sheet",
)


def test_every_operation_has_to_be_started() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    graph = find_units(model)
    work = count_work(model, graph, (torch.ones(2, 4),), rows=2, training=True)
    assert [unit.launches for unit in work.units] == [2, 1]  # views, such as that of the transposed weight, are free

    first, second = work.profile(graph, Inventory(devices=(DEVICE,))).units
    assert 2e-3 <= first.forward_s["gpu"](2) <= 2.001e-3
    assert 1e-3 <= second.forward_s["gpu"](2) <= 1.001e-3


def test_in_training_python_starts_operations_and_takes_its_time() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    graph, x = find_units(model), torch.ones(2, 4)
    quick = Inventory(devices=(DeviceSpec(name="gpu", kind="cuda", torch_device="cuda:0", memory_bytes=2**30),))
    seconds = [
        count_work(model, graph, (x,), rows=2, training=training).profile(graph, quick)["0"].forward_s["gpu"](2)
        for training in (False, True)
    ]
    assert seconds[0] < 1e-6 < seconds[1]


def test_batch_normalisation_mixes_rows_in_training_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graph, x = find_units(model), torch.ones(2, 4)
    assert count_work(model, graph, (x,), rows=2, training=True).coupled == ("1",)
    assert count_work(model, graph, (x,), rows=2, training=False).coupled == ()
