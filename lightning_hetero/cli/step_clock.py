"""What the steps of a training job take, by a clock: a callback that needs no logger and no hetero strategy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from lightning_hetero.cli.example import Example, first_of, rows_of
from lightning_hetero.plan import Plan
from lightning_hetero.profile.clock import synchronize

_WARM_UP = 3  # steps under a plan that are not counted
_ENOUGH = 50  # steps that are; waiting for the devices at the end of every step would cost a long run something


class StepClock:
    """Measures batches of training, and the memory of accelerators, under the plan that training ends with.

    A step is measured from the first hook of its batch to the last, after all devices are through. The first three
    under a plan are left out, and those after the 53rd.

    Args:
        stop_after: How many measured steps end the training; None lets it go on.

    Attributes:
        plan: The plan in effect, after the last step; None without hetero.
        example: What the model was called with first, without values; None before the first step.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self._stop_after = stop_after
        self.plan: Plan | None = None
        self.example: Example | None = None
        self._steps_s: list[float] = []
        self._rows: list[int] = []
        self._seen = 0
        self._begun_s: float | None = None
        self._peak_bytes: dict[str, int] = {}

    @classmethod
    def of(cls, trainer: Any, stop_after: int | None = None) -> Any:
        """A clock that is a callback in the Trainer's own namespace, put before its other callbacks."""
        foreign = any(base.__module__.startswith("pytorch_lightning.") for base in type(trainer).__mro__)
        home = "pytorch_lightning" if foreign else "lightning.pytorch"
        base = import_module(f"{home}.callbacks").Callback
        clock = type("StepClock", (cls, base), {})(stop_after)
        trainer.callbacks.insert(0, clock)
        return clock

    @property
    def step_s(self) -> float | None:
        """Median seconds of a step; None before the fourth."""
        return statistics.median(self._steps_s) if self._steps_s else None

    @property
    def samples_per_s(self) -> float | None:
        """Rows of those steps over their seconds. Loading of data is not part of a step."""
        return sum(self._rows) / sum(self._steps_s) if self._steps_s else None

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The most that torch held during training on each device that it counts: accelerators, not the CPU."""
        return dict(self._peak_bytes)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count memory from here on."""
        for _, module, place in _counting(getattr(trainer.strategy, "plan", None)):
            module.reset_peak_memory_stats(place)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        if self.example is None:
            self.example = first_of(batch).with_rows(None, "float32")
        self._take_note_of(getattr(trainer.strategy, "plan", None))
        if self._seen < _WARM_UP + _ENOUGH:
            self._wait(trainer)
            self._begun_s = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it. A step in which the plan changed counts for neither plan."""
        begun_s, self._begun_s = self._begun_s, None
        if begun_s is None or self._take_note_of(getattr(trainer.strategy, "plan", None)):
            return
        self._wait(trainer)
        self._seen += 1
        if self._seen > _WARM_UP:
            self._steps_s.append(time.perf_counter() - begun_s)
            self._rows.append(rows_of(batch))
        if self._stop_after is not None and len(self._rows) >= self._stop_after:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the counters before another run, such as the test, moves them."""
        self._peak_bytes = {name: module.max_memory_allocated(place) for name, module, place in _counting(self.plan)}

    def _take_note_of(self, plan: Plan | None) -> bool:
        """Begin anew if it is another plan."""
        if plan is self.plan:
            return False
        self.plan = plan
        self._seen = 0
        self._steps_s.clear()
        self._rows.clear()
        return True

    def _wait(self, trainer: Any) -> None:
        places = [str(trainer.strategy.root_device)] if self.plan is None else self.plan.torch_devices
        for place in places:
            synchronize(torch.device(place))


def _counting(plan: Plan | None) -> Iterator[tuple[str, Any, torch.device]]:
    """Name, torch's module, and place of each device in use of which torch counts the memory."""
    for device in () if plan is None else plan.used:
        place = torch.device(str(device.torch_device))
        module: Any = None if place.type in ("cpu", "meta") else torch.get_device_module(place)
        if hasattr(module, "max_memory_allocated") and hasattr(module, "reset_peak_memory_stats"):
            yield device.name, module, place
