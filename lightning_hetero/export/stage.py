"""A piece of the traced program as a program of its own, with the batch still open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.export.cut import Piece, UnitOf, cut
from lightning_hetero.export.manifest import Value
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets import StageProgram


def examples_of(pieces: Sequence[Piece], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The values at all borders, by name, for the arguments of the example."""
    values = {f"input{index}": tensor for index, tensor in enumerate(inputs)}
    with torch.no_grad():
        for piece in pieces:
            results = piece.graph(*(values[name] for name in piece.inputs))
            values.update(zip(piece.outputs, results, strict=True))
    return values


def stage_program(name: str, piece: Piece, values: Mapping[str, Tensor]) -> StageProgram:
    """Export one piece.

    Raises:
        UnsupportedError: torch.export fixes a size that has to follow the batch.
    """
    examples = tuple(values[value] for value in piece.inputs)
    shapes = tuple(
        tuple(size if isinstance(size, int) else None for size in piece.dims[value]) for value in piece.inputs
    )
    opened = tuple({dim: torch.export.Dim.AUTO for dim, size in enumerate(shape) if size is None} for shape in shapes)
    with without_chatter(), torch.no_grad():
        exported = torch.export.export(piece.graph, examples, dynamic_shapes=opened, strict=False)
    found = {node.name: node.meta["val"].shape for node in exported.graph.nodes if node.op == "placeholder"}
    for value, argument, dims in zip(piece.inputs, exported.graph_signature.user_inputs, opened, strict=True):
        shape = found[str(argument)]
        if any(isinstance(shape[dim], int) for dim in dims):
            raise UnsupportedError(
                f"{name}: torch.export fixes the size of {value} at {tuple(shape)}, though it follows the batch. "
                "Pass dynamic_batch=False to export for the batch of the example."
            )
    return StageProgram(name, exported, piece.graph, piece.inputs, piece.outputs, shapes, piece.units)


def with_parts(
    stage: StageProgram, piece: Piece, values: Mapping[str, Tensor], unit_of: UnitOf, device_of: Mapping[str, str]
) -> StageProgram:
    """The stage with its operations told apart by device."""
    parts, outputs = cut(piece.graph, unit_of, device_of, next(iter(device_of.values())))
    inside = examples_of(parts, [values[name] for name in piece.inputs])
    programs = tuple((part.device, stage_program(f"{stage.name}.{i}", part, inside)) for i, part in enumerate(parts))
    return replace(stage, parts=programs, part_outputs=outputs)


def value_of(name: str, tensor: Tensor, dims: Sequence[Any], batch: Any) -> Value:
    """What the manifest says of a value.

    Args:
        name: Its name.
        tensor: An example.
        dims: Sizes, as numbers or symbols.
        batch: The symbol of the batch, or None.
    """
    return Value(
        name=name,
        shape=tuple(size if isinstance(size, int) else None for size in dims),
        dtype=str(tensor.dtype).removeprefix("torch."),
        batch_dim=next((dim for dim, size in enumerate(dims) if not isinstance(size, int) and size == batch), None),
    )
