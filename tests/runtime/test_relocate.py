"""Parameters stay the same objects when they move, whatever holds them."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lightning_hetero.errors import PlacementError
from lightning_hetero.runtime.relocate import Replaced, relocate
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.models import MODELS, TiedTransformer

CPU = torch.device("cpu")


@pytest.fixture
def device(accelerator: EmulatedAccelerator) -> torch.device:
    return torch.device(accelerator.devices[1])


def all_to(module: nn.Module, device: torch.device) -> Replaced:
    return relocate([(part, device) for part in module.modules()], module)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_values_survive_the_way_there_and_back(name: str, device: torch.device) -> None:
    model = MODELS[name][0]()
    before = [(id(p), p.detach().clone()) for p in model.parameters()]
    assert all_to(model, device) == []
    assert {t.device for t in model.state_dict().values()} == {device}
    assert all_to(model, CPU) == []
    for parameter, (identity, value) in zip(model.parameters(), before, strict=True):
        assert id(parameter) == identity
        assert torch.equal(parameter, value)


def test_an_optimizer_made_before_the_move_trains_the_moved_parameters(device: torch.device) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    all_to(model, device)
    model(torch.ones(1, 2, device=device)).sum().backward()
    before = model.weight.detach().cpu().clone()
    optimizer.step()
    assert torch.equal(model.weight.detach().cpu(), before - 1)


def test_tied_parameters_stay_tied(device: torch.device) -> None:
    model = TiedTransformer()
    all_to(model, device)
    assert model.head.weight is model.embed.weight


def test_shared_buffers_stay_shared(device: torch.device) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    all_to(model, device)
    assert model[1].running_mean is model[0].running_mean


def test_gradients_hooks_and_attributes_come_along(device: torch.device) -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.no_weight_decay = True
    calls: list[str] = []
    layer.weight.register_hook(lambda g: calls.append("hook"))
    layer.weight.register_post_accumulate_grad_hook(lambda p: calls.append("after"))
    layer(torch.ones(1, 1)).backward()
    all_to(layer, device)
    assert layer.weight.grad is not None
    assert layer.weight.grad.device == device
    assert layer.weight.no_weight_decay
    layer(torch.ones(1, 1, device=device)).backward()
    assert calls == ["hook", "after"] * 2
    assert layer.weight.grad.item() == 2


def test_pruned_and_parametrized_modules_keep_their_parameters(device: torch.device) -> None:
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    normed = weight_norm(nn.Linear(4, 4))
    for model in (pruned, normed):
        ids = {id(p) for p in model.parameters()}
        assert all_to(model, device) == []
        assert {id(p) for p in model.parameters()} == ids
        assert model(torch.ones(1, 4, device=device)).device == device


def test_where_a_swap_is_refused_the_new_parameter_is_put_everywhere_and_reported(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    old = model[0].weight
    held = weakref.ref(old)  # torch refuses to swap what a weak reference points to
    replaced = all_to(model, device)
    if replaced:  # a backend that shares the CPU's tensor implementation needs no swap
        assert [(id(before), id(after)) for before, after in replaced] == [(id(old), id(model[0].weight))]
    assert model[0].weight is model[1].weight
    assert model[0].weight.device == device
    assert held() is old


def test_modes_and_training_flags_are_left_alone(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].eval()
    model[0].weight.requires_grad_(False)
    all_to(model, device)
    assert (model.training, model[0].training, model[0].weight.requires_grad) == (True, False, False)


def test_moving_under_inference_mode_gives_tensors_that_can_be_trained(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.inference_mode():
        all_to(model, device)
    model(torch.ones(2, 2, device=device)).sum().backward()


def test_a_deep_copy_is_independent(device: torch.device) -> None:
    model = nn.Linear(2, 2)
    all_to(model, device)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.weight.zero_()
    assert model.weight.detach().cpu().abs().sum() > 0


def test_parameters_without_values_are_refused(device: torch.device) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(PlacementError, match=r"Linear.weight is on the meta device.*to_empty"):
        all_to(model, device)
