"""Comparisons of outputs for a batch and for its parts, or for other rows beside the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hetero.runtime.engine.batch import Cut

_FINE_STEP = 1e-6  # steps of rounding above this are too coarse to tell a small coupling from rounding
STEPS = 256  # steps of rounding by which the same may differ if it was computed in another order
_FAR = 1e3  # how much larger rows are than the others, for code that has a rule for large numbers
_SAMPLE = 1 << 20  # elements that the scale of a tensor is taken from


def close(found: Tensor, expected: Tensor, precision: Sequence[torch.dtype]) -> bool:
    """Whether two results agree in half of the digits that they were computed with: kernels round differently.

    Args:
        found: One result.
        expected: The other.
        precision: Dtypes that autocast computes in.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    step = rounding_step(expected, precision)
    return torch.equal(found, expected) if step == 0.0 else _within(found, expected, step**0.5)


def same(found: Tensor, expected: Tensor, precision: Sequence[torch.dtype]) -> bool:
    """Whether two results for batches of one shape are the same, although other rows of the batches differ.

    They are equal bit for bit, because the same kernels ran on them. Only code that orders rows by their content may
    round differently; that much is granted where it cannot be mistaken for a coupling of rows.
    """
    step = rounding_step(expected, precision)
    if step == 0.0:
        return torch.equal(found, expected)
    return _within(found, expected, STEPS * step if step < _FINE_STEP else 0.0)


def with_other_rows(
    tensors: Sequence[Tensor], cut: Cut, start: int, stop: int, *, are_far: bool = False
) -> list[Tensor]:
    """The inputs with one row in the place of all from `start` to before `stop`, with other numbers if they are real.

    Args:
        tensors: The inputs.
        cut: Which of them are cut.
        start: The first row that is replaced, by others like it.
        stop: The end.
        are_far: Whether numbers are much larger, and none of them zero; else they are half as large.
    """
    result = list(tensors)
    for place in cut.positions:
        result[place] = changed = tensors[place].clone()
        row = changed[start : start + 1].clone()
        if row.is_floating_point() or row.is_complex():
            row = row * _FAR + _FAR if are_far else row * 0.5
        changed[start:stop] = row
    return result


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither an infinity in it nor what is no number."""
    return bool(as_real(tensor).isfinite().all())


def rounding_step(tensor: Tensor, precision: Sequence[torch.dtype]) -> float:
    """The step of rounding of what computed a tensor, relative to its size; 0 for integers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return max(torch.finfo(dtype).eps for dtype in (tensor.dtype, *precision))


def _within(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    a, b = as_real(found), as_real(expected)
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * _scale(b), equal_nan=b.is_floating_point()))


def _scale(tensor: Tensor) -> float:
    """The usual size of the elements: single huge ones, such as the -1e9 of a mask, must not hide the others."""
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, -(-flat.numel() // _SAMPLE))].cpu().abs()
    usual = sample[(sample > 0) & sample.isfinite()]
    return float(usual.median()) if usual.numel() else 0.0


def as_real(tensor: Tensor) -> Tensor:
    """A tensor with the same content and a dtype that torch compares."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
