"""Bytes that a unit needs while it runs: what autograd keeps, and what is there for a moment only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_hetero.profile.alone import Alone, Inputs
from lightning_hetero.profile.costs import Line
from lightning_hetero.profile.structure import tensors_in


def sizes(alone: Alone, inputs: Inputs) -> tuple[int, int]:
    """Bytes that autograd keeps of a call, and bytes that the call needs beyond them at its worst moment.

    Parameters, buffers and inputs are left out of the first, and every storage counts once. The second is read from
    the allocator of the device, whose peak starts anew; where there is none to ask, on the CPU too, it is the size of
    the outputs.
    """
    fresh = alone.fresh(inputs)
    known = [*alone.twin.parameters(), *alone.twin.buffers(), *tensors_in((fresh.args, fresh.kwargs))]
    not_counted = {_storage(tensor)[0] for tensor in known}
    kept: list[Tensor] = []  # alive until counted, so that no storage takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    module: Any = None if alone.device.type == "cpu" else getattr(torch, alone.device.type)
    before_bytes = _start_peak(module, alone.device)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = alone.forward(fresh)
    storages = dict(map(_storage, kept))
    saved_bytes = sum(size for key, size in storages.items() if key not in not_counted)
    outputs = tensors_in(output)
    if before_bytes is None:
        return saved_bytes, sum(tensor.numel() * tensor.element_size() for tensor in outputs)
    roots = [tensor for tensor in outputs if tensor.requires_grad]
    if roots and alone.training:
        torch.autograd.backward(roots, [torch.ones_like(tensor) for tensor in roots])
        alone.twin.zero_grad(set_to_none=True)
    peak_bytes = int(module.max_memory_allocated(alone.device))
    return saved_bytes, max(0, peak_bytes - before_bytes - saved_bytes)


def line_through(sizes_bytes: dict[int, int]) -> Line:
    """The line through bytes at one or two numbers of rows, nowhere negative and never falling."""
    (low, low_bytes), (high, high_bytes) = min(sizes_bytes.items()), max(sizes_bytes.items())
    if low == high:
        return Line(0.0, low_bytes / low)
    per_row = max(0.0, (high_bytes - low_bytes) / (high - low))
    fixed = low_bytes - per_row * low
    return Line(fixed, per_row) if fixed >= 0 else Line(0.0, high_bytes / high)


def _start_peak(module: Any, device: torch.device) -> int | None:
    """Bytes in use, from which the device's peak is counted now; None if it does not count."""
    if not all(hasattr(module, name) for name in ("reset_peak_memory_stats", "max_memory_allocated")):
        return None
    module.reset_peak_memory_stats(device)
    return int(module.memory_allocated(device))


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
