"""Memory that a trial has to leave as it was, however user code gets at it (`weight.data.mul_(0.9)`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Owned:
    """Keeps a copy of a tensor before the first write to its memory.

    Args:
        tensors: Names and tensors.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._of = {key: (name, tensor) for name, tensor in tensors if (key := _memory(tensor)) is not None}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def before_write(self, tensor: Tensor) -> None:
        """Something is about to write to a tensor."""
        key = _memory(tensor)
        if key in self._of:
            name, owner = self._of[key]
            if name not in self._kept:
                self._kept[name] = (owner, owner.detach().clone())

    @property
    def written(self) -> list[str]:
        """Names of those that were written to."""
        return list(self._kept)

    def put_back(self) -> None:
        """Undo all writes."""
        with torch.no_grad():
            for owner, copy in self._kept.values():
                owner.data.copy_(copy)  # by .data, so that graphs which hold the tensor do not object


def _memory(tensor: Tensor) -> int | None:
    """What two tensors that share memory have in common; None for kinds of tensors without memory of their own."""
    try:
        memory: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
    return memory
