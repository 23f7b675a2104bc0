"""An example of what a model is called with, without its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from lightning_hetero.errors import UsageError
from lightning_hetero.profile.structure import all_tensors, map_tensors


@dataclass(frozen=True)
class Example:
    """Arguments of one call.

    Attributes:
        rows: Rows of the batch: the most frequent dim 0.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    rows: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_rows(self, rows: int | None, dtype: str) -> Example:
        """The same for another number of rows, as meta tensors, floating-point ones in another dtype."""
        wanted = self.rows if rows is None else rows

        def resized(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            if shape and shape[0] == self.rows:
                shape[0] = wanted
            kind = getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype
            return torch.empty(shape, dtype=kind, device="meta")

        return Example(wanted, map_tensors(self.args, resized), map_tensors(dict(self.kwargs), resized))


def example_of(module: nn.Module, data: Any) -> Example:
    """The module's `example_input_array`, as Lightning reads it, or else what the first training batch begins with.

    Args:
        module: The model.
        data: Configuration of a LightningDataModule; None if there is none.

    Raises:
        UsageError: There is neither.
    """
    given = getattr(module, "example_input_array", None)
    if isinstance(given, Mapping):
        return Example(rows_of(given), (), dict(given))
    if given is not None:
        return Example(rows_of(given), given if isinstance(given, tuple) else (given,))
    if data is None:
        raise UsageError(
            f"{type(module).__name__} has no `example_input_array` and there is no data, so nobody knows what it is "
            "called with. Set self.example_input_array in its __init__, or configure data=..."
        )
    datamodule = instantiate(data, _convert_="all")
    datamodule.prepare_data()
    datamodule.setup("fit")
    return first_of(next(iter(datamodule.train_dataloader())))


def first_of(batch: Any) -> Example:
    """The first part of a batch such as (images, labels), which most models are called with."""
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    return Example(rows_of(first), (first,))


def rows_of(given: Any) -> int:
    """Rows of a batch: the most frequent dim 0 of its tensors; 1 without tensors."""
    counts = Counter(int(tensor.shape[0]) for tensor in all_tensors(given) if tensor.ndim)
    return max(1, counts.most_common(1)[0][0]) if counts else 1
