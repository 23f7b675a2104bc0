"""What cannot work is refused before anything moves, in words that say what to write."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero import InfeasiblePlanError, InventoryError, ModelParallel, UnsupportedError
from lightning_hetero.errors import HeteroError, PlacementError, UsageError
from lightning_hetero.testing.models import MLP

DEVICES = r"dev:0 \([\d.]+ GiB\), dev:1 \([\d.]+ GiB\), cpu \([\d.]+ GiB\)"
AVAILABLE = rf"Available: (.*, )?{DEVICES}\."
KINDS = r"\(cpu, cuda, [\w, ]*\bdev\b[\w, ]*\)"


def wraps(model: Any) -> str:
    return rf"the model is {model}, which is no instance of torch\.nn\.Module\. "


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device_ids": []}, InventoryError, rf"no device is asked for\. {AVAILABLE} Write 'auto' for all of them"),
        ({"device_ids": ["dev:9"]}, InventoryError, rf"device 'dev:9' is not available\. {AVAILABLE} Write names"),
        ({"device_ids": [9]}, InventoryError, rf"device 'dev:9' is not available\. {AVAILABLE} Write names"),
        ({"device_ids": [-1]}, InventoryError, r"device -1 does not exist: devices are counted from 0"),
        ({"device_ids": [-1], "backend": "cpu"}, InventoryError, r"device -1 does not exist"),
        ({"device_ids": [0, "warp:0"]}, InventoryError, rf"unknown device 'warp:0'\. {AVAILABLE} Write names"),
        (
            {"device_ids": [0, "dev:0"]},
            InventoryError,
            rf"device 'dev:0' is asked for twice\. {AVAILABLE} Name it once",
        ),
        ({"device_ids": [1, 1], "backend": "gloo"}, InventoryError, r"device 'cpu:1' is asked for twice"),
        ({"device_ids": ["dev"]}, InventoryError, r"'dev' is ambiguous: there are 2 devices of kind 'dev'"),
        ({"device_ids": [0], "backend": "xccl"}, InventoryError, r"device 'xpu:0' is not available: torch sees no"),
        (
            {"device_ids": [0], "backend": "warp"},
            InventoryError,
            rf"backend='warp' is neither a kind of device {KINDS} nor a process-group backend for one \(nccl, gloo, "
            r"mpi, xccl, hccl\)\. Write one of these, or leave it out for the current accelerator\.",
        ),
        ({"device_ids": ["cpu"], "backend": 3}, InventoryError, r"backend=3 is neither a kind of device"),
        ({"device_ids": ["cpu"], "backend": ""}, InventoryError, r"backend='' is neither a kind of device"),
        *(
            ({"device_ids": [entry]}, InventoryError, rf"device_ids: {entry} is neither a number, nor a text, nor a")
            for entry in (True, None, 1.5)
        ),
        *(
            (
                {"device_ids": ids},
                InventoryError,
                rf"device_ids={ids} is not a list of devices\. Write one, such as \[0, 1, 'cpu'\], or 'auto' for all "
                r"devices; memory limits belong into memory=\.",
            )
            for ids in (2, {"cpu": "1GiB"})
        ),
        ({"memory": {"dev:0": "lots"}}, InventoryError, r"the memory limit for 'dev:0': 'lots' is not a size"),
        ({"memory": {7: "1GiB"}}, InventoryError, r"device 'dev:7' is not available\. Available: dev:0"),
        (
            {"memory": {0: "1KiB"}},
            InfeasiblePlanError,
            r"the plan of policy 'even' needs 6\.\d+ KiB on 'dev:0', which has 1\.00 KiB",
        ),
        ({"placement": "fastest"}, PlacementError, r"unknown placement policy 'fastest'\. Known are .*even"),
        ({"placement": 3}, PlacementError, r"placement=3 is neither the name of a policy, nor a mapping of module"),
        ({"placement": {"first": 0}}, PlacementError, r"the device map leaves out 'second', 'third'\. Add them"),
        (
            {"placement": {"fist": 0, "": 1}},
            PlacementError,
            r"device map: no unit is named 'fist'.* Did you mean 'first'",
        ),
        ({"placement": {"": 5}}, PlacementError, r"device map, entry '': unknown device 'dev:5'"),
        ({"placement": {"": -1}}, InventoryError, r"device -1 does not exist"),
        ({"micro_batches": 0}, UsageError, r"micro_batches=0 must be a whole number from 1 on"),
        ({"no_split": "Nowhere"}, PlacementError, r"no_split='Nowhere' is neither the name nor the class of a module"),
    ],
    ids=repr,
)
def test_options_that_cannot_be_met(options: dict[str, Any], error: type[HeteroError], text: str, spread: Any) -> None:
    model = MLP()
    with pytest.raises(error, match=f"^{text}"):
        spread(model, **{"device_ids": [0, 1], **options})
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: torch.relu, UsageError, wraps("<built-in .* relu .*>") + "Wrap it in one"),
        (lambda: MLP, UsageError, wraps("<class '.*MLP'>") + "Make an instance of it first"),
        (
            lambda: torch.jit.script(MLP()),
            UnsupportedError,
            r"the model is a TorchScript module, which runs as a whole: its parts cannot stand on several devices\. "
            r"Give the module that it was made from, and torchscript=True",
        ),
    ],
    ids=["function", "class", "torchscript"],
)
def test_a_model_that_is_no_module_of_parts(
    make: Callable[[], Any], error: type[HeteroError], text: str, spread: Any
) -> None:
    with pytest.raises(error, match=f"^{text}"):
        spread(make(), device_ids=[0, 1])


def test_a_model_instead_of_a_configuration() -> None:
    with pytest.raises(UsageError) as caught:
        ModelParallel(MLP())  # type: ignore[arg-type]
    assert str(caught.value) == (
        "ModelParallel takes a ModelParallelConfig, not a MLP. Write "
        "ModelParallel(ModelParallelConfig(model=model, device_ids=[0, 1]))."
    )


def test_a_model_that_is_spread_already(spread: Any) -> None:
    module = MLP()
    model = spread(module, device_ids=[0, 1])
    for again in (module, model, nn.Sequential(module, nn.Linear(4, 4)), module.first):
        with pytest.raises(UsageError, match=r"is placed over devices already\. Call close\(\) on the ModelParallel"):
            spread(again, device_ids=["cpu", 0])
    assert model(torch.ones(2, 8)).shape == (2, 4)
    model.close()
    assert spread(module, device_ids=["cpu", 0]).output_device.type == "cpu"


@pytest.mark.parametrize("twin", [copy.deepcopy, pickle.dumps])
def test_a_copy_with_compiled_parts(twin: Callable[[Any], Any], spread: Any) -> None:
    model = spread(MLP(), device_ids=[0, 1], torchscript=True)
    with pytest.raises(UsageError) as caught:
        twin(model)
    assert str(caught.value) == (
        "a ModelParallel with torchscript=True cannot be copied or pickled. Copy its module after close(), or save "
        "its state_dict()."
    )
    model.close()
    assert twin(model)
