"""One call of an exported chain: from arguments to the tensors of its manifest, and from those to a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.errors import UsageError
from lightning_hetero.export.manifest import Manifest, Value
from lightning_hetero.export.pipeline import Values
from lightning_hetero.export.structure import describe, rebuild


def tensors_of(manifest: Manifest, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], int | None]:
    """The tensors of the arguments, in the order of the manifest's inputs, and the rows of the batch.

    Returns:
        The tensors; the rows, or None if the batch is fixed.

    Raises:
        UsageError: The arguments are not those that the model was exported with, but for the size of the batch.
    """
    leaves: list[Tensor] = []
    structure = describe((args, dict(kwargs)), leaves, "the call")
    if structure != manifest.input_structure:
        raise UsageError(
            f"{manifest.model} was exported for arguments that nest as {manifest.input_structure}, "
            f"got {structure}. Pass them in the same way, positional or by keyword, with the same constants."
        )
    return leaves, _rows(manifest, leaves)


def values_of(manifest: Manifest, leaves: Sequence[Tensor], part: slice | None = None) -> Values:
    """The inputs by name: all rows, or a part of them."""
    return {
        value.name: leaf[part] if value.batch_dim == 0 and part is not None else leaf
        for value, leaf in zip(manifest.inputs, leaves, strict=True)
    }


def result_of(manifest: Manifest, leaves: Sequence[Tensor], parts: Sequence[Values]) -> Any:
    """What the module would have returned, on the device of the first argument.

    Args:
        manifest: Says how results nest.
        leaves: The tensors of the arguments.
        parts: All values of each part of the batch, in order.
    """
    place = leaves[0].device if leaves else torch.device("cpu")
    joined = [_join(value, [values[value.name] for values in parts]).to(place) for value in manifest.outputs]
    return rebuild(manifest.output_structure, joined)


def _rows(manifest: Manifest, leaves: Sequence[Tensor]) -> int | None:
    """Rows of the batch; None if it is fixed."""
    rows: int | None = None
    for value, leaf in zip(manifest.inputs, leaves, strict=True):
        if str(leaf.dtype) != f"torch.{value.dtype}":
            raise UsageError(
                f"{value.name} must have dtype {value.dtype}, got {str(leaf.dtype).removeprefix('torch.')}"
            )
        fits = leaf.ndim == len(value.shape) and all(
            size in (None, found) for size, found in zip(value.shape, leaf.shape, strict=True)
        )
        if not fits or (value.batch_dim == 0 and rows not in (None, len(leaf))):
            wanted = ", ".join("rows" if size is None else str(size) for size in value.shape)
            raise UsageError(
                f"{value.name} must have shape ({wanted}){f' with {rows} rows' if rows else ''}, "
                f"got {tuple(leaf.shape)}"
            )
        rows = len(leaf) if value.batch_dim == 0 else rows
    if rows == 0:
        raise UsageError("the batch has no rows; give at least one")
    return rows


def _join(value: Value, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    assert value.batch_dim is not None  # rows are independent only then
    return torch.cat(parts, dim=value.batch_dim)
