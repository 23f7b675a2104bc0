"""Targets whose hardware nobody here has: what is written for them, and what their limits refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.errors import InventoryError
from lightning_hetero.export import HeteroRuntime, TargetError, export
from lightning_hetero.export.targets import family_names
from lightning_hetero.export.targets.prepared import deployment_device, limits
from lightning_hetero.testing.models import ConvNet


class Gelu(ConvNet):
    """A convolutional network with an activation that no DLA has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.gelu(x))


def take(model: nn.Module, folder: Path, targets: str, **options: Any) -> None:
    options = {"dynamic_batch": False, **options}
    export(model, folder, example_inputs=torch.rand(2, 1, 8, 8), targets=targets, **options)


def test_every_limit_has_a_source_and_every_family_a_limit() -> None:
    assert set(limits()) <= set(family_names())
    for name, limit in limits().items():
        assert limit.sources, name
        assert all(source.startswith("https://") for source in limit.sources)
        assert limit.precisions


def test_a_stage_for_a_dla_comes_with_the_command_for_it(tmp_path: Path, rng: Any) -> None:
    model = ConvNet().eval()
    take(model, tmp_path / "out", "dla:1")

    note = json.loads((tmp_path / "out" / "stage0.dla.json").read_text())
    assert note["arguments"] == ["--onnx=stage0.onnx", "--useDLACore=1", "--fp16"]
    assert note["state"] == "prepared, never run on the hardware"
    with pytest.raises(
        TargetError, match=r"^stage0: target 'dla:1' is prepared, not run, by this package \(NVIDIA DLA"
    ):
        HeteroRuntime(tmp_path / "out")
    x = torch.rand(2, 1, 8, 8, generator=rng)
    with HeteroRuntime(tmp_path / "out", {"stage0": "onnx:CPUExecutionProvider"}) as runtime:
        torch.testing.assert_close(runtime(x), model(x).detach(), rtol=0, atol=1e-5)


def test_an_operator_that_a_dla_lacks_is_named(tmp_path: Path) -> None:
    message = (
        r"^stage0: NVIDIA DLA through TensorRT has no gelu\. Put the units that use it on another device, or let it "
        r"run elsewhere with the target 'dla:0,GPU'\. It has: Activation; .*Source: https://docs\.nvidia\.com/"
    )
    with pytest.raises(TargetError, match=message):
        take(Gelu(), tmp_path / "out", "dla:0")
    assert not (tmp_path / "out").exists()


def test_dropout_is_nothing_that_hardware_has_to_know(tmp_path: Path, rng: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    take(model, tmp_path / "out", "dla:0")

    x = torch.rand(2, 1, 8, 8, generator=rng)
    with HeteroRuntime(tmp_path / "out", {"stage0": "onnx"}) as runtime:
        torch.testing.assert_close(runtime(x), model(x).detach(), rtol=0, atol=1e-5)
        kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "stage0.onnx").graph.node}
    assert kinds <= {"Conv", "Relu", "Reshape", "Gemm", "Flatten"}


def test_an_operator_that_may_run_elsewhere_is_no_error(tmp_path: Path) -> None:
    take(Gelu(), tmp_path / "out", "dla:0,GPU")

    note = json.loads((tmp_path / "out" / "stage0.dla.json").read_text())
    assert note["arguments"][-1] == "--allowGPUFallback"


def test_an_open_batch_is_refused_where_the_hardware_takes_none(tmp_path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"^stage0: NVIDIA DLA through TensorRT takes no open batch\. Export with dyn"
    ):
        take(ConvNet(), tmp_path / "out", "dla:0", dynamic_batch=True)


def test_an_fpga_gets_openvinos_files(tmp_path: Path) -> None:
    take(ConvNet(), tmp_path / "out", "fpga")

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["manifest.json", "stage0.bin", "stage0.fpga.json", "stage0.xml"]


def test_an_inventory_may_have_them_but_nobody_trains_there() -> None:
    dla = deployment_device("dla:0", memory_bytes=2**30, speed=4.0)
    inventory = Inventory(devices=(dla, *resolve_devices("cpu").devices))

    assert [device.name for device in inventory.trainable] == ["cpu"]
    assert inventory.root.name == "cpu"
    assert inventory["dla:0"].dtypes == ("float16", "int8")
    with pytest.raises(InventoryError, match=r"^none of the devices can train: dla:0\."):
        Inventory(devices=(dla,)).root  # noqa: B018
    with pytest.raises(TargetError, match=r"^no target to be prepared is called 'tpu:0'; there are dla, vitis, fpga"):
        deployment_device("tpu:0", memory_bytes=1)
