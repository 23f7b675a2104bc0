"""What part of a step every device spends on what."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.report.bars import Bar, stacked
from lightning_hetero.report.theme import OPS, Theme, paint_of
from lightning_hetero.schedule import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def utilisation(timeline: Timeline, *, theme: str | Theme = "light") -> Figure:
    """Draw one bar for each device: its work by sort, in percent of the step. Transfers run beside and do not count.

    Args:
        timeline: Predicted or measured.
        theme: "light" or "dark".

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: There is no such theme.
    """
    work = {device: timeline.work_of(device) for device in timeline.devices}
    found = {span.op for spans in work.values() for span in spans}
    ops = [*(op for op in OPS if op in found), *sorted(found - {*OPS})]
    whole_s, shares = timeline.makespan_s or 1.0, timeline.utilisation
    bars = [
        Bar(
            device,
            f"{100 * shares[device]:.0f} %",
            {op: math.fsum(span.duration_s for span in spans if span.op == op) / whole_s for op in ops},
        )
        for device, spans in work.items()
    ]
    name = f"Work in percent of the step of {format_seconds(timeline.makespan_s)}"
    return stacked(name, bars, {op: paint_of(op) for op in ops}, theme)
