"""Structures of tensors keep their shape and identity when they move."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_hetero.runtime.transfer import move
from lightning_hetero.testing.accelerator import EmulatedAccelerator


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Batch:
    x: Tensor
    note: str = "n"
    made: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.made.append(1)


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Own:
    """Knows how to move itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Own:
        return Own(self.x.to(device))


@pytest.fixture
def device(accelerator: EmulatedAccelerator) -> torch.device:
    return torch.device(accelerator.devices[0])


def test_tensors_inside_structures_move_and_the_rest_stays(device: torch.device) -> None:
    x = torch.ones(2)
    given = {"a": [x, (x, None, "text", 3)], "b": Pair(x, 1.5), "c": collections.OrderedDict(d=x), "e": torch.Size([1])}
    moved = move(given, device)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].left.device == moved["c"]["d"].device == device
    assert moved["a"][1][1:] == (None, "text", 3)
    assert moved["b"].right == 1.5
    assert type(moved["b"]) is Pair
    assert type(moved["c"]) is collections.OrderedDict
    assert given["a"][0] is x  # what belongs to the user is not changed


def test_what_is_there_already_is_returned_by_identity(device: torch.device) -> None:
    x = torch.ones(2, device=device)
    for given in (x, [x], {"x": x}, Pair(x, x), Batch(x), nn.Linear(1, 1), None, "text", 1):
        assert move(given, device) is given


def test_dataclasses_are_copied_without_running_their_init_again(device: torch.device) -> None:
    given = Batch(torch.ones(2))
    moved = move(given, device)
    assert (moved.x.device, given.x.device.type) == (device, "cpu")
    assert moved.made == [1]
    assert move(Frozen(torch.ones(1)), device).x.device == device


def test_objects_with_a_to_method_move_themselves(device: torch.device) -> None:
    assert move(Own(torch.ones(1)), device).x.device == device
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = move(packed, device)
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == device


def test_gradients_flow_back_through_a_move(device: torch.device) -> None:
    x = torch.ones(2, requires_grad=True)
    (move([x], device)[0] * 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]
