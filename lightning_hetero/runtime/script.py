"""Compiles the blocks of a placed model with TorchScript, the article's way to LibTorch."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from lightning_hetero.runtime.layout import Layout


def script_blocks(root: nn.Module, layout: Layout) -> Layout:
    """Put `torch.jit.script(block)` in the place of every block.

    The scripted modules hold the same Parameter objects.

    Args:
        root: The placed module; its blocks are replaced in the modules that hold them.
        layout: What was placed.

    Returns:
        The layout with the scripted blocks.
    """
    blocks = []
    for block in layout.blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's; this package says it in its own words
            scripted = torch.jit.script(block.module)
        parent_name, _, name = block.name.rpartition(".")
        setattr(root.get_submodule(parent_name), name, scripted)
        blocks.append(replace(block, module=scripted))
    return replace(layout, blocks=tuple(blocks))
