"""Works out from the devices of the units what every module of the tree is: a block, split, or none of our business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.graph.find import is_metric, is_placed_elsewhere


@dataclass(frozen=True, slots=True)
class Block:
    """A module with everything below it on one device, while the module above it is split (or is the root).

    Attributes:
        name: Name of the module.
        module: The module.
        device: The device of its parameters.
        shares: Devices of all its replicas, with how much each of them gets, its own first; none if there are none.
    """

    name: str
    module: nn.Module
    device: DeviceSpec
    shares: tuple[tuple[DeviceSpec, float], ...] = ()

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """Where it runs, its own device first."""
        return tuple(device for device, _ in self.shares) or (self.device,)


@dataclass(frozen=True, slots=True)
class Split:
    """A module whose parts lie on several devices. Its own code and tensors are on the root device."""

    name: str
    module: nn.Module
    chain: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole tree: blocks and split modules in order of definition; metrics, and what others placed, apart."""

    blocks: tuple[Block, ...]
    splits: tuple[Split, ...]
    metrics: tuple[nn.Module, ...]
    placed_elsewhere: tuple[nn.Module, ...]


Shares = tuple[tuple[DeviceSpec, float], ...]
_Place = tuple[DeviceSpec, Shares]


def lay_out(
    root: nn.Module, device_of: Mapping[str, DeviceSpec], shares_of: Mapping[str, Shares] | None = None
) -> Layout:
    """Find the largest modules that lie on one device.

    A block is as large as possible, because code in the middle of a block may look for the device of its own
    parameters, or use a child's weight without calling the child.

    Args:
        root: The module that was planned. It counts as split even if all its units share a device: its code is
            the user's step.
        device_of: The device of each unit, by name below `root`.
        shares_of: The replicas of units that have some.
    """
    shares_of = shares_of or {}
    units = {id(root.get_submodule(name)): (device, shares_of.get(name, ())) for name, device in device_of.items()}
    blocks: list[Block] = []
    splits: list[Split] = []
    metrics: list[nn.Module] = []
    elsewhere: list[nn.Module] = []
    visited: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in visited:
            return
        visited.add(id(module))
        if is_metric(module):
            metrics.append(module)
            return
        if is_placed_elsewhere(module) and module is not root:
            elsewhere.append(module)
            return
        places = set(_places(module, units))
        is_unit = id(module) in units  # which may have metrics of its own: they come with it
        is_apart = is_placed_elsewhere if is_unit else _is_apart
        is_run = is_unit or _is_called(module)
        if module is not root and len(places) == 1 and is_run and not any(map(is_apart, module.modules())):
            visited.update(map(id, module.modules()))
            device, shares = places.pop()
            blocks.append(Block(name, module, device, shares))
            return
        if places or module is root:
            splits.append(Split(name, module, is_chain(module)))
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", root)
    return Layout(tuple(blocks), tuple(splits), tuple(metrics), tuple(elsewhere))


def is_chain(module: nn.Module) -> bool:
    """Whether the module's `forward` is that of nn.Sequential: each child's output is the next one's input."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in module.__dict__
    )


def _is_called(module: nn.Module) -> bool:
    """Whether the module has a `forward`: ModuleList and ModuleDict are containers, of which only parts are called."""
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in module.__dict__


def _is_apart(module: nn.Module) -> bool:
    return is_metric(module) or is_placed_elsewhere(module)


def _places(module: nn.Module, units: Mapping[int, _Place]) -> Iterator[_Place]:
    """Places of the units at or below the module, looking no further than each unit."""
    if id(module) in units:
        yield units[id(module)]
        return
    for child in module.children():
        yield from _places(child, units)
