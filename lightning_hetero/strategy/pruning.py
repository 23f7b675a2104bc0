"""Lets Lightning's ModelPruning rank the weights of all layers together, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_hetero.strategy._compat import prunes_globally


class PruningOverDevices:
    """While it is open, global pruning joins weights on the root device, and takes each mask to the weight's device.

    torch refuses to join weights of several devices, though it needs them for a moment only.

    Args:
        callbacks: Of the Trainer.
        root: The root device.
    """

    def __init__(self, callbacks: Iterable[Any], root: torch.device) -> None:
        self._callbacks = [callback for callback in callbacks if prunes_globally(callback)]
        for callback in self._callbacks:
            callback.apply_pruning = partial(_apply, callback.apply_pruning, root)

    def close(self) -> None:
        """Leave the callbacks as they were."""
        for callback in self._callbacks:
            vars(callback).pop("apply_pruning", None)


def _apply(apply_pruning: Callable[..., None], root: torch.device, *args: Any, **kwargs: Any) -> None:
    with _joining_on(root):
        apply_pruning(*args, **kwargs)


@contextmanager
def _joining_on(root: torch.device) -> Iterator[None]:
    join: Any = torch.nn.utils.parameters_to_vector
    put: Any = prune.custom_from_mask

    def joined(parameters: Iterable[Tensor]) -> Any:
        return join(parameter.to(root) for parameter in parameters)

    def put_beside(module: nn.Module, name: str, mask: Tensor) -> Any:
        return put(module, name, mask.to(getattr(module, name).device))

    torch.nn.utils.parameters_to_vector = joined
    prune.custom_from_mask = put_beside
    try:
        yield
    finally:
        torch.nn.utils.parameters_to_vector, prune.custom_from_mask = join, put
