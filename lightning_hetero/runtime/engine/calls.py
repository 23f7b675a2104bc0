"""What a training step calls in its rehearsal, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime.engine.meanwhile import Meanwhile
from lightning_hetero.runtime.engine.state import saves_otherwise
from lightning_hetero.runtime.engine.streams import Generators
from lightning_hetero.runtime.engine.watch import Watch, Watched
from lightning_hetero.runtime.transfer import version_of

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Calls(TorchFunctionMode):
    """Looks at what the user's step calls.

    Args:
        watch: Knows whether a unit is at work.
        meanwhile: Looks at modules after every operation of the step's own code.
        generators: The default generators of all devices of the plan.
        reads: Told of the tensors that the step's own code computes with, and that of metrics.

    Attributes:
        read: `id` of tensors that the step's own code has read.
        reason: What it does that lanes could not, in words that follow "because"; None if nothing was seen.
        checkpoints: Whether some of it may run again for the backward.
    """

    def __init__(
        self, watch: Watch, meanwhile: Meanwhile, generators: Generators, reads: Callable[[Sequence[Tensor]], None]
    ) -> None:
        super().__init__()
        self._watch = watch
        self._meanwhile = meanwhile
        self._data: list[tuple[Tensor, int]] = []
        self._generators = generators
        self._reads = reads
        self._drew: list[Watched] = []
        self._drew_itself = False
        self.read: set[int] = set()
        self.reason: str | None = None
        self.checkpoints = False

    @property
    def writes_to_data(self) -> bool:
        """Whether `parameter.data` was written to, of which the parameter itself knows nothing."""
        return any(version_of(data) != version for data, version in self._data)

    @property
    def sets_numbers_back(self) -> str | None:
        """What draws random numbers, and leaves the generator as if it had not; None if nothing does."""
        if self._drew_itself and not self._watch.own_code:
            return "its code"
        return next((unit.name for unit in self._drew if unit not in self._watch.units), None)

    def _note_draw(self) -> None:
        unit = self._watch.current
        if unit is None:
            self._drew_itself = True
        elif unit not in self._drew:
            self._drew.append(unit)

    def log_is_called(self, name: str) -> None:
        """Somebody who does not know its micro-batch calls a method of the model."""
        if self._watch.in_unit:
            self.reason = f"a part of the model calls self.{name}, which was handed on to it"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():  # it would trace what follows, and a compiled unit does none of that
            return func(*args, **(kwargs or {}))
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.reason = "it computes gradients itself"
        elif self._watch.in_unit:
            self._watch.note_saving()
        else:
            self.checkpoints |= saves_otherwise()
            tensors = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Tensor)]
            self.read.update(map(id, tensors))
            self._reads(tensors)
        states = self._generators.states()
        result = func(*args, **(kwargs or {}))
        if self._generators.drawn_since(states):
            self._note_draw()
        if func == _DATA and isinstance(args[0], nn.Parameter):
            self._data.append((result, version_of(result)))
        self._meanwhile.look_at_what_all_have()
        if not self._watch.in_unit:
            self._meanwhile.look()
        return result
