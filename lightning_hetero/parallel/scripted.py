"""The parts of a placed module compiled with TorchScript, and the way back."""

from __future__ import annotations

from torch import nn

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.layout import Layout
from lightning_hetero.runtime.script import script_blocks


def compile_parts(root: nn.Module, layout: Layout) -> Layout:
    """Compile every block of a layout, in its place.

    Returns:
        The layout with the compiled blocks.

    Raises:
        UnsupportedError: TorchScript cannot compile a block; the blocks before it are compiled.
    """
    try:
        compiled = script_blocks(root, layout)
    except Exception as error:
        raise UnsupportedError(
            f"torchscript=True: torch.jit.script cannot compile a part of {type(root).__name__}: {error}\n"
            "Change the code that it names, or leave torchscript out."
        ) from error
    for before, after in zip(layout.blocks, compiled.blocks, strict=True):
        called = type(before.module).forward is not nn.Module.forward  # a ModuleList is not, its members are
        if called and not hasattr(after.module, "forward"):
            # torch compiles overloads of `forward` (of nn.LSTM, nn.GRU) only where they are called.
            raise UnsupportedError(
                f"torchscript=True: torch.jit.script compiles {before.name!r}, a {type(before.module).__name__}, only "
                "as a part of another module. Put a module of your own around it and name that in no_split, or leave "
                "torchscript out."
            )
    return compiled


def put_back(root: nn.Module, layout: Layout) -> None:
    """Put the blocks of a layout into the places of those that were compiled from them, and in the same mode."""
    for block in layout.blocks:
        parent_name, _, name = block.name.rpartition(".")
        parent = root.get_submodule(parent_name)
        compiled = dict(getattr(parent, name).named_modules(remove_duplicate=False))
        for inner_name, inner in block.module.named_modules(remove_duplicate=False):
            inner.training = compiled[inner_name].training
        setattr(parent, name, block.module)
