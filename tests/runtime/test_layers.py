"""The layers of a module: what repeats in it."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_hetero.runtime.layers import layers_of


class Layer(nn.Module):
    """Something with children, one of them a list of equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))


class Net(nn.Module):
    """An embedding, layers, a head with children and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer() for _ in range(3))
        self.encoder.norm = nn.LayerNorm(2)
        self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.activation = nn.Sequential(nn.ReLU(), nn.Flatten())
        self.out = nn.Linear(2, 2)


class Model(nn.Module):
    """The module above."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def names(module: nn.Module, name: str = "net") -> list[str]:
    return list(layers_of(Model(module), name))


def test_layers_and_what_has_children_beside_them() -> None:
    layers = [f"net.encoder.layers.{index}" for index in range(3)]
    assert names(Net()) == ["net.embed", *layers, "net.head"]


def test_a_layer_is_not_taken_apart() -> None:
    assert names(Net(), "net.encoder.layers.1") == ["net.encoder.layers.1"]


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.TransformerEncoderLayer(4, 2, 8),
        nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.TransformerEncoderLayer(4, 2, 8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_has_no_layers_is_one_piece(module: nn.Module) -> None:
    assert names(module) == ["net"]


def test_stages_of_layers_count_as_layers_where_they_repeat_themselves() -> None:
    stage = lambda: nn.Sequential(Layer(), Layer())  # noqa: E731
    assert names(nn.Sequential(stage(), stage())) == ["net.0", "net.1"]


def test_a_layer_that_is_used_several_times_counts_once() -> None:
    layer = Layer()
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["net.0"]
