"""What a plan for deployment says beyond other plans: which devices refuse what, and how fast a stream runs."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_hetero.placement.names import listing
from lightning_hetero.placement.objective import stream_s
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.plan.forecast import Forecast


def deployment_notes(problem: Problem, forecast: Forecast | None) -> Iterator[str]:
    """Sentences for the notes of a plan; none if nothing is deployed.

    Args:
        problem: What was planned.
        forecast: What is predicted of the answer.
    """
    if problem.is_stream and problem.profile is not None and forecast is not None:
        seconds = stream_s(forecast)
        rows_per_s = problem.profile.rows / seconds if seconds else float("inf")
        yield (
            f"In a stream, a batch of {problem.profile.rows} rows leaves every {format_seconds(seconds)}, "
            f"{rows_per_s:.3g} rows a second: so long the busiest device computes and receives for each."
        )
    for device, refused in problem.refused.items():
        by_reason: dict[str, list[str]] = {}
        for unit, reason in refused.items():
            by_reason.setdefault(reason, []).append(unit)
        for reason, units in by_reason.items():
            what = "takes no unit" if len(units) == len(problem.graph.names) else f"does not take {listing(units)}"
            yield f"{device} {what}: it {reason}."
