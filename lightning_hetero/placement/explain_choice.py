"""Why `auto` chose what it chose: in sentences, and as a list of what was rejected."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_hetero.placement.found import Found, best_of
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.refuse import in_words
from lightning_hetero.plan.forecast import Alternative
from lightning_hetero.units import format_bytes

_NOUNS = {
    "step_time": "seconds of a step",
    "throughput": "seconds of a step",
    "latency": "seconds of the forward",
    "peak_memory": "the fullest device's share of memory",
}
_STREAM = "seconds from one batch of a stream to the next"


def explain_choice(
    judge: Judge,
    best: Priced,
    winner: str,
    singles: Mapping[str, Priced],
    asked: Mapping[str, Found],
    least_gain: float,
) -> tuple[tuple[str, ...], tuple[Alternative, ...]]:
    """Notes for the plan, and its alternatives.

    Args:
        judge: Has priced everything.
        best: The choice.
        winner: The policy that it comes from.
        singles: The whole model on each device that may hold it.
        asked: What every policy found.
        least_gain: What a spread plan had to save.
    """
    home = best_of(singles.values()) if singles else None
    notes = [_verdict(judge, best, winner, least_gain)]
    if len(best.devices) > 1 and (home is None or not home.fits):
        allowed = "" if len(singles) == len(judge.names) else " that the constraints allow"
        notes.append(
            f"The model fits on no single device{allowed}." if home else "Constraints forbid any single device."
        )
    elif len(best.devices) > 1 and home is not None:
        saved = 1 - best.value / home.value
        notes.append(f"It saves {_percent(saved)} against everything on {home.homes[0]}, the best single device.")
    notes += [_idle(judge, best, name, least_gain) for name in judge.names if name not in best.devices]
    rejected = {f"single ({name})": priced for name, priced in singles.items() if priced != best}
    rejected |= {name: found.best for name, found in asked.items() if found.best != best and name != winner}
    ordered = sorted(rejected.items(), key=lambda pair: pair[1].key)
    alternatives = tuple(
        Alternative(
            policy=name if name.startswith("single") else f"{name} ({in_words(priced.execution)})",
            step_s=_step_s(judge, priced) if priced.fits else None,
            reason=_reason(priced, best, least_gain),
        )
        for name, priced in ordered
    )
    return tuple(notes), alternatives


def _step_s(judge: Judge, priced: Priced) -> float:
    return priced.value if judge.problem.is_stream else priced.forecast.step_s


def _verdict(judge: Judge, best: Priced, winner: str, least_gain: float) -> str:
    looked = f"of {judge.asked} simulated plans"
    objective = _STREAM if judge.problem.is_stream else _NOUNS[judge.problem.objective]
    if winner == "single":
        is_better = f"saves {_percent(least_gain)}" if least_gain else "is better"
        others = f"none over several devices {is_better}" if len(judge.names) > 1 else "it is the best"
        return f"Everything stands on {best.homes[0]}: {looked}, judged by {objective}, {others}."
    return f"{looked.capitalize()} the best by {objective} is by {winner!r} ({in_words(best.execution)})."


def _idle(judge: Judge, best: Priced, name: str, least_gain: float) -> str:
    """What the best plan would cost that uses a device which the choice leaves idle."""
    using = [priced for priced in judge.priced() if name in priced.devices]
    fitting = [priced for priced in using if priced.fits]
    if not using:
        return f"{name} stays idle: no plan with it was looked at."
    if not fitting:
        return f"{name} stays idle: no plan with it was found that fits."
    change = min(priced.value for priced in fitting) / best.value - 1 if best.value > 0 else 0.0
    if change < 0:
        saved, asked = _unlike(-change, least_gain)
        return f"{name} stays idle: using it would save {saved}, less than the {asked} asked."
    return f"{name} stays idle: using it would cost +{_percent(change)} (best of {len(fitting)} plans with it)."


def _reason(priced: Priced, best: Priced, least_gain: float) -> str:
    if not priced.fits:
        over = max(priced.forecast.devices, key=lambda device: device.memory_bytes / device.limit_bytes)
        return (
            f"does not fit: needs {format_bytes(over.memory_bytes)} on {over.device}, "
            f"which has {format_bytes(over.limit_bytes)}"
        )
    change = priced.value / best.value - 1 if best.value > 0 else 0.0
    if change < 0:
        saved, asked = _unlike(-change, least_gain)
        return f"saves {saved}, less than the {asked} that more devices have to save"
    return "no better" if change < 5e-4 else f"+{_percent(change)}"


def _unlike(share: float, other: float) -> tuple[str, str]:
    """Two shares in words that differ, as the shares do."""
    if _percent(share) != _percent(other):
        return _percent(share), _percent(other)
    return f"{100 * share:.3g} %" if f"{share:.3g}" != f"{other:.3g}" else "slightly less", _percent(other)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"
