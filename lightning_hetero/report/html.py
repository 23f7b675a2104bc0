"""One page of HTML about a plan: what was decided and why, what was rejected, what a step takes, how to repeat it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

from lightning_hetero.devices import INVENTORY_HEADER, Inventory, inventory_rows
from lightning_hetero.errors import UsageError
from lightning_hetero.plan import Plan
from lightning_hetero.plan.explain import (
    DEVICE_HEADER,
    HEADER,
    STAGE_HEADER,
    device_rows,
    format_seconds,
    stage_forecast_rows,
    stage_rows,
    title,
)
from lightning_hetero.report.borders import Border
from lightning_hetero.report.canvas import require_matplotlib
from lightning_hetero.report.gantt import gantt, gantt_pair
from lightning_hetero.report.memory import memory_bars
from lightning_hetero.report.page import bullets, code, folded, heading, page, paragraph, picture, table
from lightning_hetero.report.partition import partition_svg
from lightning_hetero.report.utilisation import utilisation
from lightning_hetero.schedule import Op, Timeline

LIMIT_BYTES = 10_000_000
"""No page is larger; the plan as text is left out of one that would be."""
_PACKAGES = ("lightning-hetero", "torch", "lightning", "pytorch-lightning", "numpy", "matplotlib")


def write_html(
    path: str | Path,
    plan: Plan,
    *,
    inventory: Inventory | None = None,
    predicted: Timeline | None = None,
    measured: Timeline | None = None,
    alternatives: Sequence[Plan] = (),
    borders: Sequence[Border] = (),
) -> Path:
    """Write everything that is known of a plan into one file, which needs no other and no network.

    Args:
        path: Where to.
        plan: What was decided.
        inventory: The devices and links that it was made for; None: the devices as the plan has them.
        predicted: A step as it was simulated.
        measured: A step as it was recorded.
        alternatives: Other plans that came into question, the best first.
        borders: What passes between stages, see `borders_of`.

    Returns:
        The path.

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: The file cannot be written, or would be larger than `LIMIT_BYTES`.
        InventoryError: The inventory lacks a device of the plan.
    """
    require_matplotlib()
    parts = [
        *_decision(plan, alternatives),
        heading("Stages on their devices"),
        f'<div class="wide">{partition_svg(plan, borders)}</div>',
        *_units(plan),
        *_step(predicted, measured),
        heading("Memory"),
        picture(
            "Memory of each device",
            "memory",
            8 * len(plan.devices),
            partial(memory_bars, plan, inventory),
        ),
        *_origin(plan, inventory or plan.inventory),
    ]
    whole = _page(plan, [*parts, folded("The plan as text", code(plan.to_json()))])
    if len(whole) > LIMIT_BYTES:
        whole = _page(plan, parts)
    if len(whole) > LIMIT_BYTES:
        raise UsageError(
            f"the report of this plan would have {len(whole):,} bytes, more than {LIMIT_BYTES:,}; "
            "draw its parts with lightning_hetero.report.figures"
        )
    path = Path(path)
    try:
        path.write_bytes(whole)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be written: {error}; choose another path") from error
    return path


def _page(plan: Plan, parts: Sequence[str]) -> bytes:
    return page(f"Plan by policy {plan.policy!r}", parts).encode()


def _decision(plan: Plan, alternatives: Sequence[Plan]) -> Iterator[str]:
    yield paragraph(title(plan), faint=True)
    if plan.forecast is not None:
        execution, basis = plan.execution, "estimated" if plan.forecast.estimated else "measured"
        yield paragraph(
            f"Predicted from {basis} costs: {format_seconds(plan.forecast.step_s)} a step, bound by "
            f"{plan.forecast.bottleneck}; {execution.micro_batches} micro-batches, schedule {execution.schedule!r}"
            f"{', forwards repeated in the backward' if execution.rematerialize else ''}."
        )
    yield heading("Plan")
    yield table(HEADER, stage_rows(plan))
    if plan.notes or plan.proof:
        yield heading("Reasons")
        yield bullets([*plan.notes, *([plan.proof] if plan.proof else [])])
    if plan.forecast is not None:
        yield heading("Devices in a step")
        yield table(DEVICE_HEADER, device_rows(plan.forecast))
        if plan.forecast.stages:
            yield heading("Stages in a step")
            yield table(STAGE_HEADER, stage_forecast_rows(plan.forecast))
    if alternatives:
        yield heading("Runners-up")
        yield table(("policy", "step", "devices", "stages"), [_runner_up(other) for other in alternatives])
    if plan.alternatives:
        yield heading("Rejected")
        rows = [
            (a.policy, "does not fit" if a.step_s is None else format_seconds(a.step_s), a.reason)
            for a in plan.alternatives
        ]
        yield table(("policy", "step", "why not"), rows)


def _runner_up(plan: Plan) -> tuple[str, ...]:
    step = "?" if plan.forecast is None else format_seconds(plan.forecast.step_s)
    return plan.policy, step, ", ".join(device.name for device in plan.used), str(len(plan.stages))


def _units(plan: Plan) -> Iterator[str]:
    rows = [(str(index), stage.device, ", ".join(stage.units)) for index, stage in enumerate(plan.stages)]
    yield folded("All units", table(("stage", "device", "units"), rows))


def _step(predicted: Timeline | None, measured: Timeline | None) -> Iterator[str]:
    timelines = {"Predicted": predicted, "Measured": measured}
    known = {name: timeline for name, timeline in timelines.items() if timeline is not None}
    if not known:
        return
    yield heading("A step")
    shapes = sum(len(timeline.spans) for timeline in known.values())
    if predicted is not None and measured is not None:
        yield paragraph(_comparison(predicted, measured))
        yield picture(
            "What each device does in a step, predicted over measured",
            "step",
            shapes,
            partial(gantt_pair, predicted, measured),
        )
    for name, timeline in known.items():
        if len(known) == 1:
            yield picture(
                f"What each device does in a step, {name.lower()}",
                "step",
                shapes,
                partial(gantt, timeline, name=name),
            )
        yield paragraph(f"Work of each device, {name.lower()}:")
        yield picture(
            f"Work of each device, {name.lower()}",
            f"work-{name.lower()}",
            8 * len(timeline.devices),
            partial(utilisation, timeline),
        )


def _comparison(predicted: Timeline, measured: Timeline) -> str:
    """How far off the prediction is, in what recordings see: they know neither own code nor the optimizer."""
    expected_s, found_s = _units_s(predicted), _units_s(measured)
    text = (
        "From the first to the last work of a unit: "
        f"measured {format_seconds(found_s)}, predicted {format_seconds(expected_s)}"
    )
    if not expected_s:
        return f"{text}."
    off = found_s / expected_s - 1
    return f"{text}, so {100 * abs(off):.0f} % {'more' if off >= 0 else 'less'} than predicted."


def _units_s(timeline: Timeline) -> float:
    work = [span for span in timeline.spans if span.op in get_args(Op)]
    return max((span.end_s for span in work), default=0.0) - min((span.start_s for span in work), default=0.0)


def _origin(plan: Plan, inventory: Inventory) -> Iterator[str]:
    yield heading("Devices")
    yield table(INVENTORY_HEADER, inventory_rows(inventory))
    yield heading("Versions")
    yield table(("what", "version"), [("Python", platform.python_version()), *_versions()])
    yield heading("How to repeat it")
    yield paragraph("Save the plan below as plan.json; training with it makes the same decisions again:")
    yield code('Trainer(strategy=HeteroStrategy(plan="plan.json"))')
    yield paragraph(f"Objective {plan.objective!r}, seed {plan.seed}, model {plan.model or 'unknown'}.", faint=True)


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
