"""Activation checkpointing where nothing fits without: the same placements, less kept on devices that are short."""

from __future__ import annotations

from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.units import format_bytes

TRIES = 24
"""How many of the placements that came nearest to fitting are tried, and how many of the best by the objective."""


def checkpointed(judge: Judge) -> tuple[Priced, str] | None:
    """The best placement that fits with activation checkpointing on the devices that are short without it.

    After Chen et al., "Training deep nets with sublinear memory cost", 2016. Placements with replicas, and those that
    run forwards again anyway, are left out: the runtime has no activation checkpointing for them.

    Returns:
        The placement and a sentence that says why; None if it is not allowed or not enough.
    """
    problem = judge.problem
    if not (problem.may_checkpoint and problem.training and problem.profile is not None):
        return None
    able = [one for one in judge.priced() if not (one.fits or one.shares or one.execution.rematerialize)]
    nearest = sorted(able, key=lambda one: one.key)[:TRIES]
    quickest = sorted(able, key=lambda one: one.value)[:TRIES]
    before = {judge.price_checkpointed(one, _short(one)): one for one in dict.fromkeys((*nearest, *quickest))}
    best = min((one for one in before if one.fits), key=lambda one: one.key, default=None)
    return None if best is None else (best, _why(best, before[best]))


def _short(priced: Priced) -> frozenset[str]:
    devices = priced.forecast.devices
    return frozenset(device.device for device in devices if device.memory_bytes > device.limit_bytes)


def _why(best: Priced, before: Priced) -> str:
    lacks = [
        f"{device.device} lacks {format_bytes(device.memory_bytes - device.limit_bytes)}"
        for device in before.forecast.devices
        if device.memory_bytes > device.limit_bytes
    ]
    longer = best.forecast.step_s / before.forecast.step_s - 1 if before.forecast.step_s > 0 else 0.0
    whose = "its" if len(lacks) == 1 else "their"
    return (
        f"Nothing fits with all activations kept: {', '.join(lacks)}. So {whose} layers keep their inputs only and run "
        f"again in the backward (activation checkpointing), which makes a step {100 * longer:.0f} % longer."
    )
