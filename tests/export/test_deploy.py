"""The planner places an exported model, on targets that are not here as well, and the export obeys."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import DeviceSpec, Inventory, Link
from lightning_hetero.errors import PlacementError, TargetError, UnsupportedError
from lightning_hetero.export import HeteroRuntime, export, plan_deployment
from lightning_hetero.export.deploy import as_deployment
from lightning_hetero.export.targets.prepared import deployment_device
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Constraints, Problem, get_policy, make_plan
from lightning_hetero.testing.cut_models import Choosy
from lightning_hetero.testing.models import MLP, ConvNet

CPU = DeviceSpec(
    name="cpu",
    kind="cpu",
    torch_device="cpu",
    memory_bytes=1 << 33,
    flops_per_s=(("float32", 1e9),),
    memory_bytes_per_s=1e9,
    measured="data sheet",
)


def beside_the_cpu(*targets: str) -> Inventory:
    """A slow CPU, and fast targets behind fast links."""
    others = [
        replace(
            DeviceSpec(name=name, kind="openvino", torch_device=None, memory_bytes=1 << 30, trainable=False)
            if name.startswith("openvino:")
            else deployment_device(name, memory_bytes=1 << 30),
            flops_per_s=(("float16", 1e12),),
            memory_bytes_per_s=1e11,
            measured="data sheet",
        )
        for name in targets
    ]
    names = ["cpu", *targets]
    links = [
        Link(source=a, target=b, bandwidth_bytes_per_s=1e12, latency_s=1e-9, measured="data sheet")
        for a in names
        for b in names
        if a != b
    ]
    return Inventory(devices=(CPU, *others), links=tuple(links))


class Mixed(nn.Module):
    """Convolutions that a DLA has layers for, and two units with operations that it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.middle = nn.Conv2d(8, 8, 3)
        self.norm = nn.LayerNorm(288)
        self.head = nn.Linear(288, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = nn.functional.gelu(self.middle(x))  # belongs to no unit, and runs where its argument is
        return self.head(self.norm(x.flatten(1)))  # type: ignore[no-any-return]


def test_units_with_operators_that_a_target_lacks_are_not_placed_there() -> None:
    plan = plan_deployment(Mixed(), torch.rand(1, 1, 8, 8), beside_the_cpu("dla:0"), convert_precision=True)

    assert plan.device_of == {
        "body.0": "dla:0",
        "body.2": "dla:0",
        "middle": "cpu",
        "norm": "cpu",
        "head": "dla:0",
    }
    assert "dla:0 does not take 'middle': it has no gelu." in plan.notes
    assert "dla:0 does not take 'norm': it has no layer_norm." in plan.notes
    assert plan.alternatives


def test_another_precision_has_to_be_allowed() -> None:
    inventory = beside_the_cpu("dla:0")
    exact = plan_deployment(ConvNet(), torch.rand(1, 1, 8, 8), inventory)
    short = plan_deployment(ConvNet().half(), torch.rand(1, 1, 8, 8).half(), inventory)
    converted = plan_deployment(ConvNet(), torch.rand(1, 1, 8, 8), inventory, convert_precision=True)

    assert {*exact.device_of.values()} == {"cpu"}
    assert (
        "dla:0 takes no unit: it computes in float16, int8 and not in float32 (convert_precision=true lets its tools "
        "convert)."
    ) in exact.notes
    assert {*short.device_of.values()} == {*converted.device_of.values()} == {"dla:0"}
    words = "dla:0 computes in float16, int8: the tools of its vendor convert the float32 of its stages"
    assert [note.startswith(words) for note in (short.notes[-1], converted.notes[-1])] == [False, True]


def test_a_target_with_a_fallback_takes_every_operator() -> None:
    plan = plan_deployment(Mixed(), torch.rand(1, 1, 8, 8), beside_the_cpu("dla:0,GPU"), convert_precision=True)
    assert {*plan.device_of.values()} == {"dla:0,GPU"}


def test_a_target_of_this_machine_is_a_device_too() -> None:
    plan = plan_deployment(Mixed(), torch.rand(1, 1, 8, 8), beside_the_cpu("openvino:CPU"))
    assert {*plan.device_of.values()} == {"openvino:CPU"}


@pytest.mark.parametrize(("objective", "targets"), [("latency", ["dla:0"]), ("throughput", ["dla:0", "openvino:CPU"])])
def test_the_export_obeys_the_plan_and_the_chain_gives_the_same(
    objective: str, targets: list[str], tmp_path: Path, rng: Any
) -> None:
    model, x = Mixed().eval(), torch.rand(3, 1, 8, 8, generator=rng)
    plan = plan_deployment(model, x, beside_the_cpu(*targets), objective=objective, convert_precision=True)
    options = {"placement": plan, "targets": "auto", "dynamic_batch": False}
    manifest = export(model, tmp_path / "out", example_inputs=x, **options)

    assert len({stage.source_device for stage in manifest.stages}) > 1
    assert [stage.target for stage in manifest.stages] == [
        {"cpu": "torch:cpu"}.get(stage.source_device, stage.source_device) for stage in manifest.stages
    ]
    assert {unit: stage.source_device for stage in manifest.stages for unit in stage.units} == plan.device_of
    for stage in manifest.stages:
        if stage.target == "dla:0":
            note = json.loads((tmp_path / "out" / f"{stage.name}.dla.json").read_text())
            assert note["arguments"][1] == "--useDLACore=0"
    here = {stage.name: "onnx:CPUExecutionProvider" for stage in manifest.stages if stage.target == "dla:0"}
    with HeteroRuntime(tmp_path / "out", here) as runtime:
        torch.testing.assert_close(runtime(x), model(x).detach(), rtol=0, atol=1e-5)


def test_a_device_map_says_the_targets_too(take_away: Any, rng: Any) -> None:
    model, x = MLP().eval(), torch.rand(4, 8, generator=rng)
    placement = {"": "cpu", "second": "onnx:CPUExecutionProvider"}
    manifest, runtime = take_away(model, x, placement=placement, targets="auto")

    assert [stage.target for stage in manifest.stages] == ["torch:cpu", "onnx:CPUExecutionProvider", "torch:cpu"]
    torch.testing.assert_close(runtime(x), model(x).detach(), rtol=0, atol=1e-5)


def test_what_is_no_target_cannot_be_planned_for() -> None:
    strange = DeviceSpec(name="tpu:0", kind="tpu", torch_device=None, memory_bytes=1 << 30, trainable=False)
    with pytest.raises(TargetError, match=r"^device 'tpu:0' is no target of export\. What is no device of torch"):
        plan_deployment(MLP(), torch.rand(1, 8), Inventory(devices=(CPU, strange)))


def test_what_is_no_target_cannot_be_exported_for(take_away: Any) -> None:
    with pytest.raises(TargetError, match=r"^device 'backroom' is no target of export\."):
        take_away(MLP(), torch.rand(4, 8), placement={"": "backroom"}, targets="auto")


def test_a_model_that_cannot_be_captured_cannot_be_planned_for_such_targets() -> None:
    with pytest.raises(UnsupportedError, match=r"^torch\.export cannot capture Choosy with these example inputs: "):
        plan_deployment(Choosy(), torch.rand(4, 8), beside_the_cpu("dla:0"))


def test_a_unit_that_no_device_takes_is_said() -> None:
    inventory = Inventory(devices=(CPU, deployment_device("fpga", memory_bytes=1 << 30)))
    rules = Constraints(forbidden=("cpu",))
    problem = Problem(graph=find_units(Mixed()), inventory=inventory, training=False, constraints=rules)
    problem = as_deployment(problem, Mixed(), torch.rand(1, 1, 8, 8), convert_precision=True)
    with pytest.raises(
        PlacementError, match=r"^no device is left for 'middle': 'middle' cannot stand on fpga, which has no gelu; "
    ):
        make_plan(get_policy("even"), problem)
