"""A placed module stays placed when user code tries to move it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.testing.accelerator import EmulatedAccelerator


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.to(device="cpu")])
def test_a_move_is_ignored_with_a_warning(
    move: Callable[[nn.Module], Any], place: Any, accelerator: EmulatedAccelerator
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model, {"0": accelerator.devices[0], "1": accelerator.devices[1]})
    for part in (model, model[0]):
        with pytest.warns(UserWarning, match=r"stays where the plan placed it: a move to cpu was ignored"):
            assert move(part) is part
    assert [str(p.device) for p in model.parameters()] == [d for d in accelerator.devices[:2] for _ in range(2)]
    model(torch.ones(1, 2))


def test_a_conversion_of_dtype_takes_effect(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model, {"0": accelerator.devices[0], "1": "cpu"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert str(model[0].weight.device) == accelerator.devices[0]


def test_a_move_of_a_module_that_holds_the_placed_one_is_ignored_too(
    place: Any, accelerator: EmulatedAccelerator
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    around = nn.Sequential(model)
    place(model, {"0": accelerator.devices[0], "1": "cpu"})
    with pytest.warns(UserWarning, match="stays where the plan placed it"):
        around.to("cpu")
    assert str(model[0].weight.device) == accelerator.devices[0]


def test_after_release_modules_move_again(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model, {"0": accelerator.devices[0], "1": "cpu"}).release(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.to(accelerator.devices[0])
    assert {str(p.device) for p in model.parameters()} == {accelerator.devices[0]}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_moves_on_its_own_and_goes_with_its_last_reference(
    how: Callable[[nn.Module], nn.Module], place: Any, accelerator: EmulatedAccelerator
) -> None:
    """What copies hold on a device must not wait for the garbage collector: it is memory that no plan knows of."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model, {"0": accelerator.devices[0], "1": "cpu"})
    gc.collect()
    gc.disable()
    try:
        twin = how(model[0])
        weight = weakref.ref(twin.weight)
        del twin
        assert weight() is None
    finally:
        gc.enable()
    moved = how(model[0]).to("cpu")
    assert str(moved.weight.device) == "cpu"
    assert str(model[0].weight.device) == accelerator.devices[0]
    with pytest.warns(UserWarning, match="stays where the plan placed it"):
        model[0].to("cpu")
