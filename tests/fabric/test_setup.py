"""Setting up: what becomes of modules, parameters and optimizers that exist before they are placed."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_hetero import FabricStrategy, Plan
from lightning_hetero.errors import InfeasiblePlanError, PlacementError, UnsupportedError, UsageError
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.fabric_loop import Run, net, train
from lightning_hetero.testing.lightning_module import adam, data, difference

MakeFabric = Callable[..., Fabric]


def test_parameters_and_ties_stay_the_same_objects(hostile: MakeFabric) -> None:
    model = net("tied_transformer")
    before = list(model.parameters())
    fabric = hostile()
    wrapped, optimizer = fabric.setup(model, adam(model.parameters()))
    assert all(new is old for new, old in zip(wrapped.parameters(), before, strict=True))
    assert all(new is old for new, old in zip(optimizer.param_groups[0]["params"], before, strict=True))
    assert wrapped.module is model
    assert model.head.weight is model.embed.weight


def test_where_torch_makes_new_parameters_the_optimizer_gets_them(hostile: MakeFabric) -> None:
    model = net()
    graph = model.first.weight * 2  # holds the parameter, so that accelerators cannot take it over
    run = Run.of(hostile(), model)
    assert {id(p) for p in run.optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    before = model.first.weight.detach().cpu().clone()
    run.go_on(data())
    assert not torch.equal(model.first.weight.detach().cpu(), before)
    assert graph.shape == (16, 8)


def test_an_optimizer_that_comes_later_or_has_state_already_is_taken_as_it_is(
    alone: MakeFabric, hostile: MakeFabric
) -> None:
    def in_two_parts(fabric: Any) -> Run:
        model = net()
        optimizer = adam(model.parameters())
        model(torch.ones(2, 8).double()).sum().backward()
        optimizer.step()
        wrapped = fabric.setup_module(model)
        return Run(fabric, wrapped, fabric.setup_optimizers(optimizer)).go_on(data())

    spread = in_two_parts(hostile())
    assert spread.was_spread
    assert spread.differs_from(in_two_parts(alone())) <= 1e-12


@pytest.mark.feature("Fabric: init_module and empty_init")
def test_new_modules_are_built_on_the_cpu_and_new_tensors_on_the_root(hostile: MakeFabric) -> None:
    fabric = hostile(precision="bf16-true")
    with fabric.init_module(empty_init=True):
        module = nn.Linear(4, 4)
    with fabric.init_tensor():
        tensor = torch.zeros(2)
    assert (module.weight.device.type, module.weight.dtype) == ("cpu", torch.bfloat16)
    assert (tensor.device, tensor.dtype) == (fabric.device, torch.bfloat16)


@pytest.mark.feature("Fabric: to_device")
def test_what_has_no_parameters_moves_to_the_root_and_models_are_placed(hostile: MakeFabric) -> None:
    fabric = hostile()
    loss = fabric.to_device(nn.CrossEntropyLoss(weight=torch.ones(4)))
    assert loss.weight.device == fabric.device
    assert fabric.to_device({"x": [torch.ones(2)]})["x"][0].device == fabric.device
    model = net()
    assert fabric.to_device(model) is model
    places = [parameter.device for parameter in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Fabric's, that it would gather the model again
        wrapped = fabric.setup(model)
    fabric.to_device(wrapped)
    assert [parameter.device for parameter in wrapped.parameters()] == places
    assert wrapped.device == fabric.device


def test_a_model_that_is_not_to_move_stays_as_it_is(hostile: MakeFabric) -> None:
    fabric = hostile()
    wrapped = fabric.setup(net(), move_to_device=False)
    assert {parameter.device.type for parameter in wrapped.parameters()} == {"cpu"}
    with pytest.raises(UsageError, match=r"^this model is not set up here; call fabric\.setup\(model\) first$"):
        fabric.strategy.plan_of(wrapped)


@pytest.mark.feature("Fabric: a model that the user spread over devices", note="is left as placed")
def test_a_model_that_the_user_spread_is_left_so(accelerator: EmulatedAccelerator) -> None:
    model = net()
    model.second.to(accelerator.devices[1])
    fabric = Fabric(strategy=FabricStrategy(devices=["cpu", *accelerator.devices[:2]], verbose=False))
    with pytest.warns(UserWarning, match="2 parameters on different devices"):  # Fabric's, and wrong here
        fabric.setup(model)
    assert fabric.strategy.plan.policy == "as_placed"
    assert [str(part.weight.device) for part in (model.first, model.second)] == ["cpu", accelerator.devices[1]]


def test_a_plan_counts_what_the_models_before_it_keep() -> None:
    def large() -> nn.Module:
        return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))  # 4 x 16 KiB

    fabric = Fabric(
        strategy=FabricStrategy(devices=["cpu@speed=2,mem=288KiB", "cpu@speed=1,mem=288KiB"], verbose=False)
    )
    first, second = large(), large()
    fabric.setup(first, adam(first.parameters()))  # with gradients and Adam 256 KiB
    fabric.setup(second, adam(second.parameters()))
    with pytest.raises(InfeasiblePlanError):
        fabric.setup(large())
    assert fabric.strategy.plan_of(first).used != fabric.strategy.plan_of(second).used


def test_a_plan_file_and_a_map_are_obeyed(tmp_path: Path, hostile: MakeFabric) -> None:
    root, other, _ = hostile().strategy.inventory.names
    first = train(hostile(strategy={"placement": {"first": other, "": root}}))
    plan = first.fabric.strategy.plan_of(first.model)
    assert isinstance(plan, Plan)
    assert [stage.units for stage in plan.stages] == [("first",), ("second", "third")]
    (tmp_path / "plan.json").write_text(plan.to_json())
    second = train(hostile(strategy={"plan": tmp_path / "plan.json"}))
    assert second.fabric.strategy.plan_of(second.model).device_of == plan.device_of


def test_the_plan_is_printed_once_for_each_model(capsys: pytest.CaptureFixture[str], hostile: MakeFabric) -> None:
    run = train(hostile(strategy={"verbose": True}))
    assert capsys.readouterr().out.count("Plan by policy 'round_robin'") == 1
    Run.of(run.fabric, net())
    assert capsys.readouterr().out.count("Plan by policy 'round_robin'") == 1


@pytest.mark.feature("Fabric: LBFGS and capturable=True over several devices", "refused", "placement='single' works")
def test_optimizers_that_torch_cannot_run_over_several_devices_are_refused(accelerator: EmulatedAccelerator) -> None:
    strategy = FabricStrategy(devices=["cpu", *accelerator.devices[:2]], placement="round_robin", verbose=False)
    fabric = Fabric(strategy=strategy)
    model = net()
    with pytest.raises(UnsupportedError, match="LBFGS joins all parameters into one vector"):
        fabric.setup(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.feature("Fabric: parameters of two models that are the same", "refused", "unless they use one device")
@pytest.mark.filterwarnings("ignore:The model passed to `Fabric.setup")
def test_parameters_that_two_models_share_are_refused_over_several_devices(hostile: MakeFabric) -> None:
    one, other = net(), net()
    other.first.weight = one.first.weight
    fabric = hostile()
    fabric.setup(one)
    with pytest.raises(UnsupportedError, match=r"'first\.weight' is also a parameter of a MLP that is set up already"):
        fabric.setup(other)


def test_parameters_that_two_models_share_are_no_trouble_on_one_device() -> None:
    one, other = net(), net()
    other.first.weight = one.first.weight
    fabric = Fabric(strategy=FabricStrategy(devices="cpu", verbose=False))
    fabric.setup(one)
    fabric.setup(other)
    assert other.first.weight is one.first.weight


def test_a_part_of_a_model_that_is_set_up_already_is_refused(hostile: MakeFabric) -> None:
    model = net()
    fabric = hostile()
    fabric.setup(model)
    with pytest.raises(UnsupportedError, match="a part of this Linear belongs to a model that is set up already"):
        fabric.setup(model.second)


def test_values_on_the_meta_device_are_asked_for(hostile: MakeFabric) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fabric = hostile()
    with pytest.raises(PlacementError, match=r"is on the meta device: it has a shape but no values"):
        fabric.setup(model)
    model.to_empty(device="cpu")
    fabric.setup(model)


@pytest.mark.feature("Fabric: deepcopy and pickle of a model that is set up")
def test_copies_of_a_model_are_ordinary_modules(hostile: MakeFabric) -> None:
    fabric = hostile()
    run = train(fabric)
    twin = copy.deepcopy(run.model.module).cpu()
    read = pickle.loads(pickle.dumps(run.model.module)).cpu()
    x = torch.ones(2, 8).double()
    for other in (twin, read):
        assert difference(run.model, other) == 0.0
        assert other(x).device.type == "cpu"
        with pytest.raises(UsageError):
            fabric.strategy.plan_of(other)
    assert Run.of(fabric, twin).was_spread


@pytest.mark.feature("Fabric: torch.compile of a model before setup", note="Runs whole; better: compile='stage'.")
@pytest.mark.parametrize(
    "devices",
    ["emulated", *(pytest.param(f"accelerator{word}", marks=pytest.mark.slow) for word in ("", " as root"))],
    indirect=True,
)
@pytest.mark.filterwarnings("ignore")  # of the compiler, which begins anew at each border between devices
def test_a_compiled_model_gives_the_same_numbers(alone: MakeFabric, hostile: MakeFabric) -> None:
    def compiled(fabric: Any) -> Run:
        model = torch.compile(net(), backend="eager")
        return Run.of(fabric, model).go_on(data())

    assert compiled(hostile()).differs_from(compiled(alone())) <= 1e-12
