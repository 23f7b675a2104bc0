"""Tells whether what a unit returns is what it was given: the batch itself, which may not go everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hetero.profile.structure import has_values


class Given:
    """What a unit at work was given of the batch, or of what the model's own code made of it.

    Args:
        is_visible: Whether that is all. Of what cannot be seen, anything that the unit returns may be a part.
    """

    def __init__(self, *, is_visible: bool = True) -> None:
        self._is_visible = is_visible
        self._tensors: list[tuple[Tensor, int]] = []

    def add(self, tensor: Tensor) -> None:
        """The unit is called with this tensor, as it is now."""
        self._tensors.append((tensor, version(tensor)))

    @property
    def has_tensors(self) -> bool:
        """Whether there is any."""
        return bool(self._tensors)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of these, a view of one, or a copy.

        What was changed in place since is what the unit made of it.
        """
        if not self._is_visible:
            return True
        return any(
            tensor is given or _share_storage(tensor, given) or _is_copy(tensor, given)
            for given, before in self._tensors
            if version(given) == before
        )


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _share_storage(one: Tensor, other: Tensor) -> bool:
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors and the like
        return False


def _is_copy(tensor: Tensor, given: Tensor) -> bool:
    """Whether the values are the same. Devices change the tensor, and mixed precision its dtype."""
    same_kind = tensor.dtype == given.dtype or (tensor.is_floating_point() and given.is_floating_point())
    if not same_kind or tensor.shape != given.shape or not (has_values(tensor) and has_values(given)):
        return False
    try:
        with torch.no_grad():
            return torch.equal(tensor.detach(), given.detach().to(tensor.device, tensor.dtype))
    except (NotImplementedError, RuntimeError):  # nobody can tell
        return True
