"""Puts the profile together from what was recorded and measured, and says what had to be estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.profile.benches import Basis, Bench
from lightning_hetero.profile.costs import OWN_CODE, Curve, Line, ModelProfile, UnitCost
from lightning_hetero.profile.estimate import estimate_profile
from lightning_hetero.profile.fill import Pair, add_curves, fill
from lightning_hetero.profile.job import Job
from lightning_hetero.profile.own_code import largest_moment
from lightning_hetero.profile.recording import Call, Recording
from lightning_hetero.profile.sizes import Lines

# Seconds of the backward of own code for each second of its forward: of operations it takes more, but half of such
# code is Python, which has no backward.
_OWN_BACKWARD = 1.0


def put_together(
    recording: Recording,
    inventory: Inventory,
    jobs: Mapping[str, Job],
    basis_of: Mapping[str, Basis],
    optimizer_s: Mapping[Bench, float],
    sum_s: Mapping[Bench, float],
    rows: int,
    call_overhead_s: float,
    notes: tuple[str, ...] = (),
) -> ModelProfile:
    """The profile of all units on all devices of `basis_of`.

    Args:
        recording: What was called.
        inventory: The devices.
        jobs: What was measured, by sort of unit.
        basis_of: How each device follows from a bench.
        optimizer_s: Seconds of an optimizer step for each byte, on the benches where it ran.
        sum_s: Seconds of adding gradients for each byte, likewise.
        rows: Rows of the batches to come.
        call_overhead_s: What the runtime adds to each call.
        notes: What else was estimated.
    """
    training = any(job.training for job in jobs.values())
    benches = tuple(dict.fromkeys(basis.bench for basis in basis_of.values()))
    found = {sort: {b: pair for b in benches if (pair := job.curves(b)) is not None} for sort, job in jobs.items()}
    weights = {sort: _weight_bytes(job) for sort, job in jobs.items()}
    real = {basis.bench: inventory[name].speed for name, basis in basis_of.items() if not basis.estimated}
    full = fill(found, weights, benches, rows, real)
    notes = (*notes, *_notes(recording, jobs, basis_of, found))
    if full is None:
        order = [call.unit for call in recording.calls]
        sizes_only = estimate_profile(
            recording.graph,
            inventory,
            rows=rows,
            training=training,
            flows=recording.flows,
            calls=order,
            call_overhead_s=call_overhead_s,
        )
        return replace(
            sizes_only,
            sees_batch=recording.sees_batch,
            out_of_sight=recording.out_of_sight,
            notes=(*sizes_only.notes, *notes),
        )
    calls: dict[str, list[Call]] = {}
    for call in recording.calls:
        calls.setdefault(call.unit, []).append(call)
    sorts = {name: recording.sort_of[name] for name in calls}
    units = tuple(
        _unit(name, these, jobs[sorts[name]], full[sorts[name]], basis_of, recording.rows)
        for name, these in calls.items()
    )
    return ModelProfile(
        model=recording.graph.fingerprint,
        rows=rows,
        units=units,
        own_code=_own_code(recording, units, basis_of, training),
        flows=recording.flows,
        sees_batch=recording.sees_batch,
        out_of_sight=recording.out_of_sight,
        entering=recording.entering if training else (),
        code=recording.own_code.code(recording.rows) if training else (),
        waiting=recording.own_code.waiting(recording.rows) if training else (),
        coupled=recording.coupled,
        optimizer_s_per_byte={
            # The runtime stretches what modules do on an emulated device, not what optimizers do.
            device: basis.optimizer_s_per_byte or _of(optimizer_s, basis)
            for device, basis in basis_of.items()
        }
        if training
        else {},
        gradient_sum_s_per_byte={device: _of(sum_s, basis) for device, basis in basis_of.items()} if training else {},
        call_overhead_s=call_overhead_s,
        estimated=any(basis.estimated for basis in basis_of.values()),
        notes=notes,
    )


def _of(seconds: Mapping[Bench, float], basis: Basis) -> float:
    """Of a device, from those of a bench; where the bench could not tell, from the slowest."""
    bench = replace(basis.bench, steady=False)
    slowest_s = max(seconds.values(), default=0.0)
    return seconds.get(bench, slowest_s) * (basis.factor if basis.estimated else 1.0)


def _unit(
    name: str, calls: list[Call], job: Job, pairs: Mapping[Bench, Pair], basis_of: Mapping[str, Basis], seen_rows: int
) -> UnitCost:
    """A unit's cost; calls on inputs of other sizes than the first count in proportion to their elements."""
    first = max(1, _elements(calls[0]))
    size = sum(_elements(call) for call in calls) / first if _elements(calls[0]) else float(len(calls))
    bytes_ = job.sizes
    if bytes_ is None:
        outputs = sum((spec.line(seen_rows) for spec in calls[0].outputs), Line())
        inputs = sum((spec.line(seen_rows) for spec in calls[0].inputs), Line())
        bytes_ = Lines(outputs, outputs, inputs, outputs, outputs + inputs, outputs.scaled(2.0), counted=False)
    largest = max(max(1, _elements(call)) for call in calls) / first
    return UnitCost(
        name=name,
        calls=len(calls),
        forward_s={d: b.curve(pairs[b.bench][0].scaled(size), len(calls)) for d, b in basis_of.items()},
        backward_s={d: b.curve(pairs[b.bench][1].scaled(size), len(calls)) for d, b in basis_of.items()}
        if job.training
        else {},
        saved_bytes=bytes_.saved.scaled(size / len(calls)) if job.training else Line(),
        saved_output_bytes=bytes_.saved_output.scaled(size / len(calls)) if job.training else Line(),
        saved_input_bytes=bytes_.saved_input.scaled(size / len(calls)) if job.training else Line(),
        temporary_bytes=bytes_.forward.scaled(largest),
        backward_bytes=bytes_.backward.scaled(largest) if job.training else Line(),
        inference_bytes=bytes_.inference.scaled(largest),
    )


def _own_code(
    recording: Recording, units: tuple[UnitCost, ...], basis_of: Mapping[str, Basis], training: bool
) -> UnitCost:
    """The model's own code: what was recorded, in the proportion of units then to units on the device.

    That also takes off what the first call of everything took longer.
    """
    rows = recording.rows
    recorded_s = sum(call.seconds for call in recording.calls)
    forward: dict[str, Curve] = {}
    for device, basis in basis_of.items():
        units_s = add_curves([unit.forward_s[device] for unit in units])(rows)
        if not basis.estimated:
            units_s /= basis.factor  # the runtime stretches what modules do on an emulated device, not what is around
        forward[device] = Curve(((rows, recording.own_code_s * units_s / max(recorded_s, 1e-9)),))
    saved, shared, moment = _own_bytes(recording, units, training)
    learns = training and any(p.requires_grad for p in recording.module.parameters())
    return UnitCost(
        name=OWN_CODE,
        forward_s=forward,
        backward_s={device: curve.scaled(_OWN_BACKWARD if learns else 0.0) for device, curve in forward.items()}
        if training
        else {},
        saved_bytes=saved,
        saved_output_bytes=shared,
        temporary_bytes=moment,
    )


def _own_bytes(recording: Recording, units: tuple[UnitCost, ...], training: bool) -> tuple[Line, Line, Line]:
    """What own code keeps after the last unit, the part that units keep anyway, and what it needs for a moment."""
    handed = [flow for flow in recording.flows if flow.target == OWN_CODE]
    if not training:
        return (
            Line(),
            Line(),
            max((flow.size_bytes for flow in handed), key=lambda size: size(recording.rows), default=Line()),
        )
    end = recording.own_code.in_the_end(recording.rows)
    if end is not None:
        rows, of_units = recording.rows, {unit.name: unit.saved_output_bytes for unit in units}
        shared = [k.size_bytes for k in end.kept if k.source and of_units[k.source](rows) >= k.size_bytes(rows)]
        return sum((kept.size_bytes for kept in end.kept), Line()), sum(shared, Line()), end.moment_bytes
    # The loss and activations keep what they are handed, sums do not.
    saved = sum((flow.size_bytes for flow in handed if flow.has_gradient), Line())
    return saved, Line(), largest_moment((flow.size_bytes for flow in handed), recording.rows)


def _notes(
    recording: Recording,
    jobs: Mapping[str, Job],
    basis_of: Mapping[str, Basis],
    found: Mapping[str, Mapping[Bench, Pair]],
) -> tuple[str, ...]:
    notes = []
    for sort, job in jobs.items():
        names = [name for name, other in recording.sort_of.items() if other == sort]
        who = f"Unit {names[0]!r}" + (f" (and {len(names) - 1} like it)" if len(names) > 1 else "")
        for bench, measured in {replace(basis.bench, steady=False): basis.bench for basis in basis_of.values()}.items():
            where = bench.torch_device
            if bench in job.errors and measured in found[sort]:
                notes.append(f"{who} ran alone on {where} with one number of rows only: {job.errors[bench]}")
            elif bench in job.errors:
                notes.append(f"{who} could not run alone on {where} and is estimated there: {job.errors[bench]}")
            elif not job.may_be_on(bench):
                notes.append(f"{who} is estimated on {where}: constraints keep it from there.")
            elif measured not in found[sort]:
                notes.append(f"{who} is estimated on {where}: there was no time left to measure it.")
    away = [device for device, basis in basis_of.items() if basis.estimated]
    if away:
        notes.append(f"Not on this machine, so estimated from its CPU: {', '.join(away)}.")
    return tuple(notes)


def _weight_bytes(job: Job) -> float:
    return max(1.0, float(sum(p.numel() * p.element_size() for p in job.unit.parameters())))


def _elements(call: Call) -> int:
    return sum(spec.numel for spec in call.inputs)
