"""What probes work on: numbers, copies and sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hetero.devices.stopwatch import Work


def copy_of(tensor: Tensor, target: torch.device, *, pinned: bool = False) -> Work:
    """A copy of a tensor into memory of `target` that is there already.

    Two accelerators of different types go through host memory, as they do at run time: which of the two backends
    would carry out a direct copy is not defined.
    """
    kinds = {tensor.device.type, target.type}
    if pinned:
        if tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=target, pin_memory=target.type == "cpu")
        return lambda: there.copy_(tensor, non_blocking=True)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=target)
    if len(kinds) > 1 and "cpu" not in kinds:
        between = torch.empty(tensor.shape, dtype=tensor.dtype)
        return lambda: there.copy_(between.copy_(tensor))
    return lambda: there.copy_(tensor)


def filled(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers that look like a model's: constants would let some hardware run faster than it does.

    The user's stream of random numbers is left alone.
    """
    numbers = torch.rand(min(count, 2**16), generator=torch.Generator().manual_seed(0)) - 0.5
    numbers = numbers.to(dtype).to(device)
    return numbers.repeat(-(-count // len(numbers)))[:count]


def growing(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """`first`, `factor` times that, and so on, up to `last`, which is one of them.

    Example:
        >>> growing(64, 300), growing(64, 10)
        ((64, 128, 256, 300), (10,))
    """
    sizes: list[int] = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)
