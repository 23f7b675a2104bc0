"""Recurrent layers for devices without a fused kernel, in the order of operations that the CPU uses.

On any device but the CPU torch sends `nn.LSTM` and `nn.GRU` through a fused cell, whose rounding differs.
These are torch's unfused CPU algorithms, written with ordinary operators: equal to the CPU bit for bit in
float64 (in float32 the CPU may prefer oneDNN's LSTM), and with autograd, autocast and accounting for free.

Layouts: a whole batch is a tensor of shape (T, B, F); a packed one is (sum of batch sizes, F), its steps
one after the other, longest sequences first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Hidden = tuple[Tensor, ...]  # (h,) or (h, c), each of shape (B, H)
Cell = Callable[[Tensor, Hidden, "Weights"], Hidden]  # input part of the gates, hidden, weights -> hidden

# The second key lets autograd see the operators inside; the first is the one that inference mode looks at.
_KEYS = ("PrivateUse1", "AutogradPrivateUse1")
_libraries: list[torch.library.Library] = []  # a kernel lives as long as its library


class Weights:
    """Parameters of one layer in one direction: `w_ih, w_hh[, b_ih, b_hh][, w_hr]`."""

    def __init__(self, flat: Sequence[Tensor], has_biases: bool) -> None:
        self.ih, self.hh = flat[0], flat[1]
        self.b_ih: Tensor | None = flat[2] if has_biases else None
        self.b_hh: Tensor | None = flat[3] if has_biases else None
        projection = flat[4:] if has_biases else flat[2:]
        self.hr = projection[0] if projection else None


def _lstm(gates_in: Tensor, hidden: Hidden, weights: Weights) -> Hidden:
    h, c = hidden
    gates = F.linear(h, weights.hh, weights.b_hh).add_(gates_in)
    i, f, g, o = gates.unsafe_chunk(4, 1)
    i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
    c = (f * c).add_(i * g)
    h = o * c.tanh()
    return (h if weights.hr is None else F.linear(h, weights.hr)), c


def _gru(gates_in: Tensor, hidden: Hidden, weights: Weights) -> Hidden:
    (h,) = hidden
    in_r, in_z, in_n = gates_in.unsafe_chunk(3, 1)
    r, z, n = F.linear(h, weights.hh, weights.b_hh).unsafe_chunk(3, 1)
    r = r.add_(in_r).sigmoid_()
    z = z.add_(in_z).sigmoid_()
    n = in_n.add(n.mul_(r)).tanh_()
    return ((h - n).mul_(z).add_(n),)


def _simple(nonlinearity: Callable[[Tensor], Tensor]) -> Cell:
    def cell(gates_in: Tensor, hidden: Hidden, weights: Weights) -> Hidden:
        return (nonlinearity(F.linear(hidden[0], weights.hh, weights.b_hh).add_(gates_in)),)

    return cell


def _steps(gates_in: Tensor, batch_sizes: list[int] | None) -> list[Tensor]:
    return list(gates_in.unbind(0)) if batch_sizes is None else list(gates_in.split(batch_sizes))


def _run_forward(cell: Cell, steps: list[Tensor], start: Hidden, weights: Weights) -> tuple[list[Tensor], Hidden]:
    """Walk through time; where sequences end, their hidden state is final and leaves the batch."""
    hidden, outputs, finished = start, [], []
    for step in steps:
        rows = step.shape[0]
        if rows < hidden[0].shape[0]:
            finished.append(tuple(part[rows:] for part in hidden))
            hidden = tuple(part[:rows] for part in hidden)
        hidden = cell(step, hidden, weights)
        outputs.append(hidden[0])
    if finished:
        hidden = tuple(torch.cat(parts) for parts in zip(hidden, *reversed(finished), strict=True))
    return outputs, hidden


def _run_backward(cell: Cell, steps: list[Tensor], start: Hidden, weights: Weights) -> tuple[list[Tensor], Hidden]:
    """Walk against time; where sequences begin to exist, their start state joins the batch."""
    hidden, outputs = tuple(part[: steps[-1].shape[0]] for part in start), []
    for step in reversed(steps):
        rows, known = step.shape[0], hidden[0].shape[0]
        if rows > known:
            hidden = tuple(torch.cat([old, new[known:rows]]) for old, new in zip(hidden, start, strict=True))
        hidden = cell(step, hidden, weights)
        outputs.append(hidden[0])
    return outputs[::-1], hidden


def _stack(
    cell: Cell,
    inputs: Tensor,
    batch_sizes: list[int] | None,
    start: Sequence[Hidden],
    flat_weights: Sequence[Tensor],
    has_biases: bool,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, list[Hidden]]:
    """All layers, one above the other.

    Args:
        cell: One step of one layer.
        inputs: (T, B, F), or packed.
        batch_sizes: Rows of each step of a packed batch; None for a whole one.
        start: Hidden state of each layer and direction, in torch's order: l0, l0_reverse, l1, ...
        flat_weights: The parameters in the same order.
        has_biases: Whether each layer has `b_ih` and `b_hh`.
        dropout: Probability, applied to the output of every layer but the last.
        bidirectional: Whether each layer has a second direction.

    Returns:
        The output of the last layer, shaped as `inputs`, and the final hidden states in the order of `start`.
    """
    size = len(flat_weights) // len(start)
    weights = [Weights(flat_weights[i : i + size], has_biases) for i in range(0, len(flat_weights), size)]
    runs = (_run_forward, _run_backward) if bidirectional else (_run_forward,)
    join = torch.stack if batch_sizes is None else torch.cat
    final: list[Hidden] = []
    while len(final) < len(start):
        if final and dropout > 0:
            inputs = torch.dropout(inputs, dropout, train=True)
        outputs = []
        for run in runs:
            own = weights[len(final)]
            steps = _steps(F.linear(inputs, own.ih, own.b_ih), batch_sizes)
            of_steps, last = run(cell, steps, start[len(final)], own)
            outputs.append(join(of_steps))
            final.append(last)
        inputs = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return inputs, final


def _as_autocast_wants(parts: Hidden) -> Hidden:
    """The hidden state in the precision of the gates, so that outputs have it too, as those of fused layers."""
    kind = parts[0].device.type
    return (
        tuple(part.to(torch.get_autocast_dtype(kind)) for part in parts) if torch.is_autocast_enabled(kind) else parts
    )


def _kernel(cell: Cell, packed: bool) -> Callable[..., tuple[Tensor, ...]]:
    """The operator `aten::<name>.data` (packed) or `aten::<name>.input` for a cell."""

    def run(
        inputs: Tensor,
        batch_sizes: list[int] | None,
        hx: Tensor | Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...]:
        parts = _as_autocast_wants((hx,) if isinstance(hx, Tensor) else tuple(hx))
        start = list(zip(*(part.unbind(0) for part in parts), strict=True))
        dropout = dropout if train else 0.0
        outputs, final = _stack(cell, inputs, batch_sizes, start, weights, has_biases, dropout, bidirectional)
        return outputs, *(torch.stack(part, 0) for part in zip(*final, strict=True))

    def run_packed(data: Tensor, batch_sizes: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return run(data, batch_sizes.tolist(), *rest)

    def run_whole(inputs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *rest_of_packed, batch_first = rest
        if not batch_first:
            return run(inputs, None, *rest_of_packed)
        outputs, *final = run(inputs.transpose(0, 1), None, *rest_of_packed)
        return outputs.transpose(0, 1), *final

    return run_packed if packed else run_whole


def _one_step(cell: Cell) -> Callable[..., Hidden | Tensor]:
    """The operator `aten::<name>_cell`, behind `nn.LSTMCell` and `nn.GRUCell`."""

    def run(
        inputs: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Hidden | Tensor:
        flat = (w_ih, w_hh) if b_ih is None or b_hh is None else (w_ih, w_hh, b_ih, b_hh)
        weights = Weights(flat, has_biases=len(flat) == 4)
        hidden: Hidden = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        after = cell(F.linear(inputs, weights.ih, weights.b_ih), hidden, weights)
        return after[0] if isinstance(hx, Tensor) else after

    return run


def register() -> None:
    """Give torch's extra device type these kernels. To be called once."""
    cells = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _simple(torch.tanh), "rnn_relu": _simple(torch.relu)}
    library = torch.library.Library("aten", "IMPL")
    for key in _KEYS:
        for name, cell in cells.items():
            library.impl(f"{name}.input", _kernel(cell, packed=False), key)
            library.impl(f"{name}.data", _kernel(cell, packed=True), key)
        library.impl("lstm_cell", _one_step(_lstm), key)
        library.impl("gru_cell", _one_step(_gru), key)
    _libraries.append(library)
