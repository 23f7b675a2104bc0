"""What the simulator is told about a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """A stage, and the seconds that it takes for one micro-batch.

    Attributes:
        device: Name of its device, which may own several stages.
        forward_s: Its forward.
        backward_s: Its backward.
        input_gradient_s: The first half of a split backward; None: half of the backward.
        weight_gradient_s: The second half; None: half of the backward. Both together may take longer than the whole.
        send_forward_s: Moving its output to the next stage, if that stands on another device.
        send_backward_s: Moving the gradient of its input to the stage before, if that stands on another device.
    """

    device: str
    forward_s: float
    backward_s: float
    input_gradient_s: float | None = None
    weight_gradient_s: float | None = None
    send_forward_s: float = 0.0
    send_backward_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ScheduleError(
                    f"a stage on {self.device!r}: {field.name} must be finite seconds, at least 0; got {value}"
                )

    def seconds(self, op: Op) -> float:
        """What the op takes, without transfers."""
        if op == "F":
            return self.forward_s
        half_s = {"I": self.input_gradient_s, "W": self.weight_gradient_s}.get(op, self.backward_s)
        return self.backward_s / 2 if half_s is None else half_s
