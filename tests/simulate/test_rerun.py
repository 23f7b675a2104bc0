"""What is predicted to run again is what the runtime runs again, for trees of modules of many shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from lightning_hetero.devices import Inventory
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile.estimate import estimate_profile
from lightning_hetero.runtime.layers import layers_of
from lightning_hetero.runtime.layout import lay_out
from lightning_hetero.simulate import Costs
from lightning_hetero.simulate.rerun import pieces_to_rerun
from lightning_hetero.testing.inventories import inventory_of


class Called(nn.Module):
    """A module with named parts. Input (rows, 4)."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return x


def block() -> nn.Module:
    return Called(a=nn.Linear(4, 4), b=nn.Linear(4, 4))


TREES: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(*(block() for _ in range(3))),
    "a stem and a head": lambda: Called(stem=nn.Linear(4, 4), body=nn.Sequential(block(), block()), head=block()),
    "lists": lambda: Called(first=nn.ModuleList([block(), block()]), second=nn.ModuleList([nn.Linear(4, 4)])),
    "layers in layers": lambda: nn.Sequential(*(Called(inner=nn.Sequential(block(), block())) for _ in range(2))),
    "one of a kind": lambda: Called(body=nn.Sequential(block(), nn.Linear(4, 4))),
    "deep": lambda: Called(net=Called(layers=nn.ModuleList([block(), block()]), norm=nn.LayerNorm(4)), top=block()),
    "of torch": lambda: nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(2)), nn.Linear(4, 4)),
    "names that begin alike": lambda: Called(net=block(), net2=block(), nets=nn.Sequential(block(), block())),
}


@pytest.mark.parametrize("tree", sorted(TREES))
@pytest.mark.parametrize("borders", range(4))
def test_pieces_are_the_layers_of_the_runtime(tree: str, borders: int) -> None:
    model = TREES[tree]()
    there: Inventory = inventory_of("x", "y")
    graph = find_units(model)
    costs = Costs(graph, there, estimate_profile(graph, there, rows=4, training=True))
    names = graph.names
    cut = len(names) * borders // 4
    device_of = {name: "x" if index < cut else "y" for index, name in enumerate(names)}
    layout = lay_out(model, {name: there[device] for name, device in device_of.items()})
    layers = [layer for each in layout.blocks for layer in layers_of(model, each.name)]
    below = {tuple(name for name in names if f"{name}.".startswith(f"{layer}.")) for layer in layers}
    # What only holds modules, and is never called, does nothing.
    holders = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    below -= {tuple(n for n in names if n.startswith(f"{holder}.")) for holder in holders & set(layers)}
    order = [unit.name for unit in costs.units]
    assert {tuple(order[a:b]) for a, b in pieces_to_rerun(costs, device_of, names)} == below
