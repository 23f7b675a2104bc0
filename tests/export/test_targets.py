"""The families of targets: what they write runs where it was asked for, or the message says what there is.

What AOTInductor compiles runs in `test_cpp.py`.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.export import HeteroRuntime, TargetError, export
from lightning_hetero.export.targets import target as targets
from lightning_hetero.export.targets.openvino import compile_model, compiled_run, core
from lightning_hetero.testing.cut_models import Hourglass
from lightning_hetero.testing.models import MLP

SECOND = "FPGACPU"  # OpenVINO's plugin for CPUs wants "CPU" in the name


@pytest.fixture(scope="module")
def second_device() -> str:
    """A second device for OpenVINO, played by the CPU."""
    if SECOND not in core().available_devices:
        core().register_plugin("openvino_intel_cpu_plugin", SECOND)
    return SECOND


def on_batches(module: torch.nn.Module, runtime: HeteroRuntime, rng: Any) -> None:
    module.eval()
    for rows in (1, 7, 64):
        x = torch.rand(rows, 8, generator=rng)
        torch.testing.assert_close(runtime(x), module(x).detach(), rtol=0, atol=1e-5)


def test_onnx_runs_every_node_on_the_provider_that_was_asked_for(take_away: Any, rng: Any, tmp_path: Path) -> None:
    model = MLP()
    _, runtime = take_away(model, torch.rand(2, 8, generator=rng), targets="onnx:CPUExecutionProvider")
    on_batches(model, runtime, rng)

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    file = tmp_path / "exported0" / "stage0.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    assigned = session.get_provider_graph_assignment_info()
    assert {subgraph.ep_name for subgraph in assigned} == {"CPUExecutionProvider"}


def test_a_provider_that_is_not_there_is_an_error_and_no_fallback(take_away: Any, tmp_path: Path) -> None:
    message = (
        r"^stage0: target 'onnx:CUDAExecutionProvider': this ONNX Runtime has no such provider\. It has "
        r".*CPUExecutionProvider; install the build of onnxruntime that has CUDAExecutionProvider, or choose one"
    )
    with pytest.raises(TargetError, match=message):
        take_away(MLP(), torch.rand(2, 8), targets="onnx:CUDAExecutionProvider")

    # It was written all the same: who exports need not have the hardware.
    with HeteroRuntime(tmp_path / "exported0", {"stage0": "onnx:CPUExecutionProvider"}) as runtime:
        assert runtime(torch.rand(3, 8)).shape == (3, 4)


def test_openvino_computes_in_float32(take_away: Any, rng: Any, tmp_path: Path) -> None:
    model = Hourglass()
    _, runtime = take_away(
        model,
        torch.rand(2, 8, generator=rng),
        targets="openvino:CPU",
        placement={"": "a", "down.2": "b", "up.0": "b"},
    )
    on_batches(model, runtime, rng)

    compiled = compile_model(tmp_path / "exported0" / "stage0.xml", "CPU", {})
    assert str(compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_openvino_spreads_a_stage_over_devices_as_it_was_told(
    take_away: Any, rng: Any, tmp_path: Path, second_device: str
) -> None:
    model = Hourglass()
    target = f"openvino:HETERO:{second_device},CPU"
    manifest, runtime = take_away(
        model,
        torch.rand(2, 8, generator=rng),
        targets=target,
        affinity={"": second_device, "down.2": "CPU", "up.0": "CPU"},
    )
    on_batches(model, runtime, rng)

    (stage,) = manifest.stages
    assert {device for _, device in stage.affinity} == {second_device, "CPU"}
    compiled = compile_model(tmp_path / "exported0" / "stage0.xml", target.partition(":")[2], dict(stage.affinity))
    assert sorted(compiled.get_property("EXECUTION_DEVICES")) == ["CPU", second_device]
    x = torch.rand(5, 8, generator=rng)
    torch.testing.assert_close(compiled_run(compiled)([x])[0], model(x).detach(), rtol=0, atol=1e-5)


def test_an_affinity_for_a_device_that_the_target_does_not_name_is_refused(take_away: Any) -> None:
    with pytest.raises(
        TargetError, match=r"^stage0: affinity puts first on 'GPU', which is not in 'openvino:HETERO:A,CPU'"
    ):
        take_away(MLP(), torch.rand(2, 8), targets="openvino:HETERO:A,CPU", affinity={"": "CPU", "first": "GPU"})


def test_an_openvino_device_that_is_not_there_is_named(take_away: Any) -> None:
    with pytest.raises(TargetError, match=r"^stage0: target 'openvino:HETERO:FPGA,CPU': OpenVINO has no device 'FPGA'"):
        take_away(MLP(), torch.rand(2, 8), targets="openvino:HETERO:FPGA,CPU")


class Shortened(nn.Module):
    """Hands bfloat16 from layer to layer. For whole numbers from -2 to 2 all that it computes is exact in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.5, 1.5).data.round_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x.float()).relu().bfloat16()
        return self.second(x.float()).bfloat16(), x.sum(1, dtype=torch.float32)


@pytest.mark.parametrize("target", ["onnx:CPUExecutionProvider", "openvino:CPU"])
def test_bfloat16_crosses_borders_though_numpy_does_not_know_it(take_away: Any, rng: Any, target: str) -> None:
    model = Shortened().eval()
    example = torch.rand(4, 8, generator=rng).bfloat16()
    manifest, runtime = take_away(model, example, targets=target, placement={"first": "a", "second": "b"})

    assert [value.dtype for value in manifest.outputs] == ["bfloat16", "float32"]
    for rows in (1, 7):
        x = torch.randint(-2, 3, (rows, 8), generator=rng).bfloat16()
        for found, wanted in zip(runtime(x), model(x), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_torchscript_works_with_a_warning_of_ours_and_none_of_torch(take_away: Any, rng: Any) -> None:
    model = Hourglass()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, runtime = take_away(model, torch.rand(2, 8, generator=rng), targets="torchscript:cpu")
    on_batches(model, runtime, rng)

    ours = [warning for warning in caught if issubclass(warning.category, FutureWarning)]
    assert [str(warning.message)[:48] for warning in ours] == ["target 'torchscript': torch deprecates TorchScri"]
    assert not [warning for warning in caught if issubclass(warning.category, DeprecationWarning)]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "onyx:CPU",
            r"^unknown target 'onyx:CPU'\. Did you mean 'onnx'\? Targets are written family:device; available ",
        ),
        (
            {"stage0": "torch", "stage7": "torch"},
            r"^targets: there is no stage 'stage7'.*The stages are stage0 \(on a\)",
        ),
        ({"stage1": "torch"}, r"^targets leaves out 'stage0'\. Add them, or a target for the rest: '': 'torch:cpu'\.$"),
    ],
)
def test_targets_that_cannot_be_are_refused(tmp_path: Path, wanted: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        export(
            MLP(),
            tmp_path / "out",
            example_inputs=torch.rand(2, 8),
            targets=wanted,
            placement={"": "a", "third": "b"},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda name: None if name.startswith("onnx") else find_spec(name))

    message = (
        r"^target 'onnx' needs onnx and onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime\. Avail"
    )
    with pytest.raises(TargetError, match=message) as caught:
        export(MLP(), tmp_path / "out", example_inputs=torch.rand(2, 8), targets="onnx")
    assert "torch:cpu, " in str(caught.value)
    assert "openvino:CPU" in str(caught.value)
    assert "onnx:" not in str(caught.value)
