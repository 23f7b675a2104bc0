"""Bytes that a unit needs while it runs: what autograd keeps, and what is there for a moment only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_hetero.profile.alone import Alone, Inputs
from lightning_hetero.profile.costs import Line
from lightning_hetero.profile.structure import tensors_in


class Sizes(NamedTuple):
    """Bytes of one call.

    Attributes:
        saved: What autograd keeps. Parameters, buffers and inputs are left out, and every storage counts once.
        saved_output: The part of it that the unit returns.
        saved_input: What autograd keeps of the inputs.
        forward: What the forward needs beyond it at its worst moment, outputs included.
        backward: What the backward needs beyond it, with the gradients that come, those that go, and those of
            parameters.
        inference: What a forward needs at its worst moment where autograd keeps nothing, outputs included.
        counted: Whether the allocator of the device has counted the last three. On a CPU, which has none to ask, they
            are sums of sizes.
    """

    saved: float
    saved_output: float
    saved_input: float
    forward: float
    backward: float
    inference: float
    counted: bool


class Lines(NamedTuple):
    """The same as functions of rows."""

    saved: Line
    saved_output: Line
    saved_input: Line
    forward: Line
    backward: Line
    inference: Line
    counted: bool


def sizes(alone: Alone, inputs: Inputs) -> Sizes:
    """Measure a call. The peak of the device's allocator starts anew."""
    fresh = alone.fresh(inputs)
    given = tensors_in((fresh.args, fresh.kwargs))
    of_inputs = {_storage(tensor)[0] for tensor in given}
    not_counted = of_inputs | {_storage(tensor)[0] for tensor in (*alone.twin.parameters(), *alone.twin.buffers())}
    inputs_bytes = sum(tensor.nbytes for tensor in given if tensor.requires_grad)
    kept: list[Tensor] = []  # alive until counted, so that no storage takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    before_bytes = _start_peak(alone.device)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = alone.forward(fresh)
    all_kept = dict(map(_storage, kept))
    kept.clear()
    storages = {key: size for key, size in all_kept.items() if key not in not_counted}
    saved_input_bytes = sum(size for key, size in all_kept.items() if key in of_inputs)
    outputs = tensors_in(output)
    saved_bytes = sum(storages.values())
    returned = {_storage(tensor)[0] for tensor in outputs}
    saved_output_bytes = sum(size for key, size in storages.items() if key in returned)
    outputs_bytes = sum(tensor.nbytes for tensor in outputs)
    roots = [tensor for tensor in outputs if tensor.requires_grad] if alone.training else []
    if before_bytes is None:
        gradients_bytes = sum(p.nbytes for p in alone.twin.parameters() if p.requires_grad) if roots else 0
        moment = outputs_bytes + inputs_bytes + gradients_bytes if roots else 0
        # Of what is kept, the largest piece may be there beside what is made of it.
        inference_bytes = outputs_bytes + max(storages.values(), default=0)
        return Sizes(
            saved=saved_bytes,
            saved_output=saved_output_bytes,
            saved_input=saved_input_bytes,
            forward=outputs_bytes,
            backward=moment,
            inference=inference_bytes,
            counted=False,
        )
    forward_bytes = _peak(alone.device) - before_bytes - saved_bytes
    backward_bytes = 0
    if roots:
        end: Any = _End.apply(*roots)  # type: ignore[no-untyped-call]
        del output, outputs, roots  # whoever took them counts them, or nobody has them any more
        _start_peak(alone.device)
        end.backward()
        backward_bytes = _peak(alone.device) - before_bytes - saved_bytes
        alone.twin.zero_grad(set_to_none=True)
    else:
        del output, outputs
    moments = (max(0, forward_bytes), max(0, backward_bytes), _inference_bytes(alone, inputs))
    return Sizes(saved_bytes, saved_output_bytes, saved_input_bytes, *moments, counted=True)


def _inference_bytes(alone: Alone, inputs: Inputs) -> float:
    """The most that a forward needs beyond its inputs where nothing is kept."""
    fresh = alone.fresh(inputs)
    before_bytes = _start_peak(alone.device) or 0
    alone.infer(fresh)
    return _peak(alone.device) - before_bytes


class _End(torch.autograd.Function):
    """Takes outputs without keeping them. The gradients that it gives belong to autograd, as in a larger graph."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in outputs]
        return torch.zeros((), device="cpu")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def lines_through(found: Mapping[int, Sizes], *, constant: bool) -> Lines:
    """The lines through sizes at one or two numbers of rows; level ones if nothing depends on the rows."""

    def line(at: int) -> Line:
        column = {rows: float(each[at]) for rows, each in found.items()}
        return Line(max(column.values())) if constant else line_through(column)

    counted = all(each.counted for each in found.values())
    return Lines(line(0), line(1), line(2), line(3), line(4), line(5), counted)


def line_through(sizes_bytes: Mapping[int, float]) -> Line:
    """The line through bytes at one or two numbers of rows, nowhere negative and never falling."""
    (low, low_bytes), (high, high_bytes) = min(sizes_bytes.items()), max(sizes_bytes.items())
    if low == high:
        return Line(0.0, low_bytes / low)
    per_row = max(0.0, (high_bytes - low_bytes) / (high - low))
    fixed = low_bytes - per_row * low
    return Line(fixed, per_row) if fixed >= 0 else Line(0.0, high_bytes / high)


def counts_memory(device: torch.device) -> bool:
    """Whether torch can say how much memory of a device was in use at most."""
    module = _module(device)
    return all(hasattr(module, name) for name in ("reset_peak_memory_stats", "max_memory_allocated"))


def _module(device: torch.device) -> Any:
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def _start_peak(device: torch.device) -> int | None:
    """Bytes in use, from which the device's peak is counted now; None if it does not count."""
    if not counts_memory(device):
        return None
    _module(device).reset_peak_memory_stats(device)
    return int(_module(device).memory_allocated(device))


def _peak(device: torch.device) -> int:
    return int(_module(device).max_memory_allocated(device))


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
