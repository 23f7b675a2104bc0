"""Finds the layers of a module: what repeats in it, and is worth running again instead of keeping what it made.

A whole network on one device that is run again in one piece needs as much memory in its backward as it would have
needed in its forward. Layers that are run again one by one need their inputs, and the inside of one of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def layers_of(root: nn.Module, name: str) -> dict[str, nn.Module]:
    """The parts of a module that are worth running again one by one, by name; the module itself if it has no layers.

    Layers are modules of one class, with children of their own, in an nn.Sequential or nn.ModuleList; the outermost of
    them count. Beside layers, other modules with children count too, if no layers are in them.

    Args:
        root: The module above.
        name: Name of the module below `root`.
    """
    module = root.get_submodule(name)
    parent = root.get_submodule(name.rpartition(".")[0])
    if _is_layer(module, parent) or not _has_layers(module):
        return {name: module}
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, part in _parts(name, module):
        found.setdefault(id(part), (path, part))
    return dict(found.values())


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, child in _children(module):
        path = f"{name}.{key}"
        if _has_layers(child) and not _is_layer(child, module):
            yield from _parts(path, child)
        elif _is_compound(child):
            yield path, child


def _has_layers(module: nn.Module) -> bool:
    """Whether a module below this one is a layer."""
    return any(_is_layer(child, part) for part in module.modules() for _, child in _children(part))


def _is_layer(module: nn.Module, parent: nn.Module) -> bool:
    if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or not _is_compound(module):
        return False
    return sum(type(child) is type(module) for _, child in _children(parent)) > 1


def _is_compound(module: nn.Module) -> bool:
    return bool(_children(module)) and next(module.parameters(), None) is not None


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children, repeated ones too."""
    return [(key, child) for key, child in module._modules.items() if child is not None]
