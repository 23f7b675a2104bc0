"""Estimates for what could not be measured, from what could."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_hetero.profile.benches import Bench
from lightning_hetero.profile.costs import Curve

Pair = tuple[Curve, Curve]  # forward, backward


def fill(
    measured: Mapping[str, Mapping[Bench, Pair]],
    weights_bytes: Mapping[str, float],
    benches: Iterable[Bench],
    rows: int,
    speeds: Mapping[Bench, float] | None = None,
) -> dict[str, dict[Bench, Pair]] | None:
    """Curves of every sort of unit on every bench.

    What was measured on another bench is scaled by how the two compare over the sorts measured on both, or by their
    speeds where there is no such sort. What was measured nowhere takes as long, by parameter byte, as all that was
    measured.

    Args:
        measured: Curves by sort and bench.
        weights_bytes: Bytes of parameters of each sort, above 0.
        benches: All benches.
        rows: At which benches are compared.
        speeds: Relative speeds of benches, as far as they are known.

    Returns:
        None if nothing was measured at all.
    """
    full: dict[str, dict[Bench, Pair]] = {sort: dict(pairs) for sort, pairs in measured.items()}
    benches = tuple(benches)
    if not any(full.values()):
        return None
    for bench in benches:
        for sort, pairs in measured.items():
            if bench not in full[sort] and pairs:
                other = next((other for other in pairs if _on_both(measured, bench, other)), next(iter(pairs)))
                factor = _ratio(measured, bench, other, rows, speeds or {})
                forward, backward = pairs[other]
                full[sort][bench] = forward.scaled(factor), backward.scaled(factor)
    known = [sort for sort, pairs in full.items() if pairs]
    known_bytes = sum(weights_bytes[sort] for sort in known)
    for bench in benches:
        forward = add_curves([full[sort][bench][0] for sort in known])
        backward = add_curves([full[sort][bench][1] for sort in known])
        for sort in full.keys() - set(known):
            factor = weights_bytes[sort] / known_bytes
            full[sort][bench] = forward.scaled(factor), backward.scaled(factor)
    return full


def add_curves(curves: Iterable[Curve]) -> Curve:
    """The sum of some curves, at every number of rows at which one of them was measured."""
    curves = tuple(curves)
    counts = sorted({rows for curve in curves for rows, _ in curve.points})
    return Curve(tuple((rows, sum(curve(rows) for curve in curves)) for rows in counts))


def _on_both(measured: Mapping[str, Mapping[Bench, Pair]], bench: Bench, other: Bench) -> list[Mapping[Bench, Pair]]:
    return [pairs for pairs in measured.values() if bench in pairs and other in pairs]


def _ratio(
    measured: Mapping[str, Mapping[Bench, Pair]], bench: Bench, other: Bench, rows: int, speeds: Mapping[Bench, float]
) -> float:
    both = _on_both(measured, bench, other)
    if not both and bench in speeds and other in speeds:
        return speeds[other] / speeds[bench]
    here, there = (sum(pairs[at][0](rows) + pairs[at][1](rows) for pairs in both) for at in (bench, other))
    return here / there if here > 0 and there > 0 else 1.0
