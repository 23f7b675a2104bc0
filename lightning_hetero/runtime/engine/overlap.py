"""Tensors that share memory: what is done to one of them in place is done to the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor


def have_overlap(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> bool:
    """Whether two of the tensors have an element in common, or one of them with one of the others.

    Parts of one tensor that `chunk` has made have none.

    Args:
        tensors: Tensors, each once.
        others: More of them. A tensor that is in both is one tensor.
    """
    known = set(map(id, tensors))
    foreign = [tensor for tensor in others if id(tensor) not in known]
    pairs = [*combinations(tensors, 2), *((a, b) for a in tensors for b in foreign)]
    return any(_memory(a) == _memory(b) is not None and _overlap(a, b) for a, b in pairs)


def _memory(tensor: Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return None
    memory: int = tensor.untyped_storage()._cdata
    return memory


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first, last), (begin, end) = _span(a), _span(b)
    if a.element_size() != b.element_size():
        return True
    if last < begin or end < first:
        return False
    origin = min(first, begin)
    taken = torch.zeros(max(last, end) - origin + 1, dtype=torch.bool, device="cpu")
    try:
        _elements(taken, a, origin).fill_(True)
    except RuntimeError:  # some element stands in several places, as `unfold` has it
        return True
    return bool(_elements(taken, b, origin).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first and the last of its elements in memory."""
    first = int(tensor.storage_offset())
    return first, first + sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _elements(memory: Tensor, like: Tensor, origin: int) -> Tensor:
    """The elements that a tensor has, in a memory that begins at `origin`."""
    shape = [size if step else 1 for size, step in zip(like.shape, like.stride(), strict=True)]
    return memory.as_strided(shape, like.stride(), like.storage_offset() - origin)
