"""Tensors that nobody has touched since they were made: a copy of them need not wait for what was launched later."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from lightning_hetero.runtime.copies import Mark
from lightning_hetero.runtime.transfer import version_of


class Fresh:
    """Tensors, and when they are ready.

    For those who get them without user code in between: a change that torch is not told of, through `tensor.data` or
    by a kernel of somebody's own, is not seen here.

    Args:
        made_at: When the tensors are ready.
        tensors: The tensors. They are not kept alive.
    """

    __slots__ = ("_known", "_made_at")

    def __init__(self, made_at: Mark, tensors: Sequence[Tensor]) -> None:
        self._made_at = made_at
        self._known = [(weakref.ref(tensor), version_of(tensor)) for tensor in tensors]

    def ready(self, tensors: Sequence[Tensor]) -> Mark | None:
        """When these tensors are ready; None if some are others, or have been changed since."""
        known = [(tensor, version) for ref, version in self._known if (tensor := ref()) is not None]
        found = all(any(t is tensor and version_of(t) == version for t, version in known) for tensor in tensors)
        return self._made_at if found else None
