"""One unit alone on one device: its forward and backward at any number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.profile.clock import medians, timed
from lightning_hetero.profile.flows import TensorSpec
from lightning_hetero.profile.isolate import copy_of
from lightning_hetero.profile.sample import Sample
from lightning_hetero.profile.structure import map_tensors, own_copy, tensors_in

Carriers = frozenset[int]  # which of a sample's tensors hold the batch's rows, by their place


_CACHE_BYTES = 2 << 20  # as much as a core has for itself


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call, on the device and with a number of rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Alone:
    """A copy of a unit on a device.

    Args:
        unit: The unit, which stays as it is.
        sample: A call of it.
        seen_rows: Rows of the batch in that call.
        device: Where to run it.
        training: Whether to run the backward too.
        followers: Modules without parameters through which what it returns goes.
    """

    def __init__(
        self,
        unit: nn.Module,
        sample: Sample,
        *,
        seen_rows: int,
        device: torch.device,
        training: bool,
        followers: Sequence[nn.Module] = (),
    ) -> None:
        self.device = device
        self.sample = sample
        self.training = training
        self._seen_rows = seen_rows
        self._elsewhere = torch.zeros(_CACHE_BYTES if device.type == "cpu" else 0, dtype=torch.uint8, device="cpu")
        self.twin = copy_of(unit, lambda tensor: tensor.to(device, copy=True))
        self.followers = [copy_of(other, lambda tensor: tensor.to(device, copy=True)) for other in followers]

    def inputs(self, rows: int, carriers: Carriers) -> Inputs:
        """The sample's arguments with the first `rows` rows; where it has fewer, they come again."""
        places = iter(range(len(self.sample.inputs)))

        def visit(tensor: Tensor) -> Tensor:
            if next(places) in carriers:
                tensor = _first(tensor, rows * tensor.shape[0] // self._seen_rows)
            return tensor.to(self.device)

        def other(obj: Any) -> Any:  # graph batches and the like know best how to move themselves
            return own_copy(obj).to(self.device) if callable(getattr(obj, "to", None)) else obj

        return Inputs(map_tensors(self.sample.args, visit, other), map_tensors(self.sample.kwargs, visit, other))

    def fresh(self, inputs: Inputs) -> Inputs:
        """Copies for one call, which may change them; leaves of autograd are behind them, not they themselves."""
        specs = iter(self.sample.inputs)

        def visit(tensor: Tensor) -> Tensor:
            needs_gradient = next(specs).requires_grad and self.training
            with torch.enable_grad():
                return tensor.detach().requires_grad_(needs_gradient).clone()

        return Inputs(map_tensors(inputs.args, visit, own_copy), map_tensors(inputs.kwargs, visit, own_copy))

    def forward(self, fresh: Inputs) -> Any:
        """Call the unit, and what follows it."""
        return self._call(fresh, self.followers)

    def infer(self, fresh: Inputs) -> Any:
        """The same without a graph."""
        return self._call(fresh, self.followers, records=False)

    def _call(self, fresh: Inputs, followers: Sequence[nn.Module], *, records: bool = True) -> Any:
        dtype = self.sample.autocast
        autocast = nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
        with torch.set_grad_enabled(self.training and records), autocast:
            output = self.twin(*fresh.args, **fresh.kwargs)
            for follower in followers:
                output = follower(output)
            return output

    def seconds(self, inputs: Inputs) -> tuple[float, float]:
        """Seconds of the forward and of the backward; 0.0 for a backward that is not needed."""
        forward_s, backward_s = medians(lambda: self._once(inputs))
        return forward_s, backward_s

    def scales(self, rows: int, carriers: Carriers) -> bool:
        """Whether the unit runs at this number of rows and returns as many.

        Raises:
            Exception: Whatever the unit raises.
        """
        outputs = tensors_in(self._call(self.fresh(self.inputs(rows, carriers)), ()))
        expected = [self._shape0(spec, rows) for spec in self.sample.outputs]
        got = [tensor.shape[0] if tensor.dim() else 0 for tensor in outputs]
        return len(got) == len(expected) and all(e is None or e == g for e, g in zip(expected, got, strict=True))

    def _shape0(self, spec: TensorSpec, rows: int) -> int | None:
        return spec.shape[0] * rows // self._seen_rows if spec.carries(self._seen_rows) else None

    def _once(self, inputs: Inputs) -> tuple[float, float]:
        self._cool()
        fresh = self.fresh(inputs)
        forward_s, output = timed(self.device, lambda: self.forward(fresh))
        roots = [tensor for tensor in tensors_in(output) if tensor.requires_grad] if self.training else []
        if not roots:
            return forward_s, 0.0
        self._cool()
        gradients = [torch.ones_like(tensor) for tensor in roots]
        backward_s, _ = timed(self.device, lambda: torch.autograd.backward(roots, gradients))
        self.twin.zero_grad(set_to_none=True)
        return forward_s, backward_s

    def _cool(self) -> None:
        """Put other things into the cache: in a step, the whole model runs between two calls of a unit."""
        if self.device.type == "cpu":
            self._elsewhere.add_(1)


def carrier_choices(sample: Sample, rows: int) -> Iterator[Carriers]:
    """Guesses, the best first, which tensors of a call hold the batch's rows in dim 0."""
    exact = frozenset(i for i, spec in enumerate(sample.inputs) if spec.shape[:1] == (rows,))
    several = frozenset(i for i, spec in enumerate(sample.inputs) if spec.carries(rows))
    choices = [exact, several, frozenset(sorted(exact)[:1]), frozenset(sorted(several)[:1])]
    yield from (choice for choice in dict.fromkeys(choices) if choice)


def _first(tensor: Tensor, count: int) -> Tensor:
    if count <= tensor.shape[0]:
        return tensor[:count]
    return tensor.index_select(0, torch.arange(count, device=tensor.device) % tensor.shape[0])
