"""Whether a batch may go through a chain in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hetero.export.manifest import Value
from lightning_hetero.export.trace import Trace


def rows_are_independent(traced: Trace, outputs: Sequence[Value]) -> bool:
    """Whether rows in two parts give what they give together: tried out, with other numbers than the example's.

    Args:
        traced: The module.
        outputs: What it gives.
    """
    if traced.batch is None or any(output.batch_dim is None for output in outputs):
        return False
    # Equal rows would not show that a model subtracts the mean of its batch.
    rng = torch.Generator().manual_seed(0)
    inputs = [
        tensor + torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) if tensor.is_floating_point() else tensor
        for tensor in traced.examples
    ]
    first = traced.rows // 2
    with torch.no_grad():
        whole = traced.program(*inputs)
        parts = [
            traced.program(*(tensor[rows] if _is_batched(tensor, traced) else tensor for tensor in inputs))
            for rows in (slice(0, first), slice(first, None))
        ]
    return all(
        _close(output, together, [part[i] for part in parts])
        for i, (output, together) in enumerate(zip(outputs, whole, strict=True))
    )


def _is_batched(tensor: Tensor, traced: Trace) -> bool:
    return tensor.ndim > 0 and len(tensor) == traced.rows


def _close(output: Value, whole: Tensor, parts: Sequence[Tensor]) -> bool:
    joined = torch.cat(list(parts), dim=output.batch_dim or 0)
    if not whole.is_floating_point():
        return torch.equal(joined, whole)
    scale = float(whole.abs().max()) if whole.numel() else 0.0
    return joined.shape == whole.shape and torch.allclose(joined, whole, rtol=1e-4, atol=1e-5 * scale)
