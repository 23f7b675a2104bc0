"""All metrics of a module whose training steps run in micro-batches, and what a step does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_hetero.graph.find import is_metric
from lightning_hetero.runtime.engine.gate import Gate, Seen, Together, never


class Gates:
    """The gates of all metrics of a module.

    Args:
        seen: See `Gate`.

    Attributes:
        gated: `id` of modules behind them.
    """

    def __init__(self, seen: Seen | None = None) -> None:
        self._seen = seen
        self._of: dict[int, Gate] = {}
        self.gated: set[int] = set()

    def __iter__(self) -> Iterator[Gate]:
        return iter(self._of.values())

    def add(self, metric: nn.Module) -> None:
        """Put gates on a metric and all metrics in it, which have their turn together: they may share states."""
        parts = [each for each in metric.modules() if is_metric(each)]
        known = next((self._of[id(each)].together for each in parts if id(each) in self._of), None)
        together = known or Together(id(metric))
        for each in parts:
            if id(each) not in self._of:
                gate = self._of[id(each)] = Gate(each, together, self._seen)
                gate.install()
        self.gated.update(map(id, metric.modules()))

    def follow(self, module: nn.Module) -> bool:
        """Put gates on metrics that a module has got meanwhile, and take them off those that it has no more.

        Returns:
            Whether there are new ones.
        """
        there = list(module.modules())
        new = [each for each in there if is_metric(each) and id(each) not in self._of]
        if not new and len(self._of) == sum(map(is_metric, there)):
            return False
        kept = set(map(id, there))
        for gate in [each for key, each in self._of.items() if key not in kept]:
            gate.remove()
            gate.together.gates.remove(gate)
            del self._of[id(gate.module)]
        for metric in new:
            self.add(metric)
        self.gated = {id(each) for gate in self for each in gate.module.modules()}
        return bool(new)

    def remove(self) -> None:
        """Take all of them off."""
        for gate in self:
            gate.remove()
        self._of.clear()
        self.gated.clear()

    @contextmanager
    def watched(self, in_unit: Callable[[], bool]) -> Iterator[None]:
        """Within the block, everything that is done with the metrics is noted; until the next such block.

        Args:
            in_unit: Says whether a unit runs.
        """
        for together in self._all:
            together.end()
        for gate in self:
            gate.used.clear()
            gate.calls = 0
            gate.used_in_unit = False
            gate.in_unit = in_unit
        for together in self._all:
            together.look()
        kinds = [(gate, type(gate.module)) for gate in self]
        for gate in self:
            gate.watch_readers()
        try:
            yield
            for together in self._all:
                together.look()
        finally:
            for gate, kind in kinds:
                object.__setattr__(gate.module, "__class__", kind)
            for gate in self:
                gate.in_unit = never

    def note_reading(self, tensors: Sequence[Tensor]) -> None:
        """Code of the step computes with some tensors; if it is not that of metrics, see whether these are states."""
        every = self._all
        if not any(together.is_open for together in every):
            for together in every:
                together.is_read |= any(id(tensor) in together.tensors for tensor in tensors)

    def take_calls(self) -> list[int]:
        """What was passed since this was asked last, a key for each time."""
        found = [gate.together.key for gate in self for _ in range(gate.calls)]
        for gate in self:
            gate.calls = 0
        return found

    def reason(self) -> str | None:
        """Why micro-batches that use the metrics as was noted cannot be under way at once; None if they can."""
        reason = next((gate.needs_all_before for gate in self if gate.needs_all_before), None)
        for together in self._all:
            if reason is None and together.is_read:
                reason = f"it reads the state of {together.gates[0].name}, which depends on the micro-batches before"
            reason = reason or together.change
            together.end()
        return reason

    @property
    def _all(self) -> Sequence[Together]:
        return list({id(gate.together): gate.together for gate in self}.values())
