"""Outputs that are parts of other outputs, such as `h[:, 0]` beside `h`: made of the joined one again.

On one device, what is done to one of them in place is done to the other, and gradients of both arrive at the larger
one. So it is with tensors that have been joined only if one is made of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hetero.runtime.engine.cut import CannotCutError


class View(NamedTuple):
    """What an output has of each row of another one.

    Attributes:
        base: Place of the other output.
        offset: Elements from the beginning of a row to the first one.
        shape: Without the rows.
        strides: Likewise, in elements.
        is_detached: Whether no gradient goes from it to the other one.
    """

    base: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_detached: bool

    def of(self, base: Tensor) -> Tensor:
        """The part of a joined tensor, which is contiguous."""
        source = base.detach() if self.is_detached else base
        row = math.prod(base.shape[1:])
        return source.as_strided(
            (base.shape[0], *self.shape), (row, *self.strides), base.storage_offset() + self.offset
        )


def parts_of_others(outputs: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Places of outputs that are parts of other outputs, with the places of these.

    Args:
        outputs: Of a batch of several rows: what has one row may be in the same memory by chance.
    """
    if len({_memory(output) for output in outputs}) == len(outputs):
        return ()
    found: dict[int, int] = {}
    for place, base in permutations(range(len(outputs)), 2):
        if place not in found and base not in found and _view(outputs[place], outputs[base]) is not None:
            found[place] = base
    return tuple(found.items())


def views_of(
    pairs: Sequence[tuple[int, int]], parts: Sequence[Sequence[Tensor]], traced: Sequence[bool]
) -> dict[int, View]:
    """How such outputs are made of the others, by their places.

    Args:
        pairs: From `parts_of_others`.
        parts: Of each output, its tensors for each part of a batch.
        traced: Of each output, whether it has a gradient.

    Raises:
        CannotCutError: An output is no such part, or has a gradient that the other one has not.
    """
    found: dict[int, View] = {}
    for place, base in pairs:
        views = {_view(part, whole) for part, whole in zip(parts[place], parts[base], strict=True)}
        view = views.pop()
        if view is None or views or (traced[place] and not traced[base]):
            raise CannotCutError("its outputs share memory")
        found[place] = View(base, *view, is_detached=traced[base] and not traced[place])
    return found


def _memory(tensor: Tensor) -> object:
    is_plain = tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0
    return tensor.untyped_storage()._cdata if is_plain else object()


def _view(part: Tensor, whole: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Offset, shape and strides of what `part` has of each row of `whole`; None if it is no part of that kind."""
    if part is whole or _memory(part) != _memory(whole) or part.dtype != whole.dtype:
        return None
    if not (part.dim() and whole.dim() and whole.is_contiguous() and part.shape[0] == whole.shape[0]):
        return None
    size = math.prod(whole.shape[1:])  # of a row; strides say nothing where there is one row
    offset = int(part.storage_offset() - whole.storage_offset())
    shape, strides = tuple(part.shape[1:]), tuple(map(int, part.stride()[1:]))
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    is_within = offset >= 0 and last < size and (part.shape[0] == 1 or part.stride(0) == size)
    return (offset, shape, strides) if is_within else None
