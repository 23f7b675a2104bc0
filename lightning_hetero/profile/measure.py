"""Measures a recorded model: each unit alone, then among others, on each device, at some numbers of rows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from lightning_hetero.devices.host_memory import keep_host_memory
from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import ProfileError
from lightning_hetero.profile.allowed import Allowed, MayRun
from lightning_hetero.profile.assemble import put_together
from lightning_hetero.profile.benches import Bench, bases, optimizer_s_per_byte
from lightning_hetero.profile.costs import ModelProfile
from lightning_hetero.profile.isolate import undisturbed
from lightning_hetero.profile.job import Job, first_line
from lightning_hetero.profile.recording import Recording
from lightning_hetero.profile.replay import replay


def measure_model(
    recording: Recording,
    inventory: Inventory,
    *,
    rows: int | None = None,
    training: bool = True,
    out_of_time: Callable[[], bool] | None = None,
    budget_s: float = 10.0,
    call_overhead_s: float = 0.0,
    may_run: MayRun | None = None,
) -> ModelProfile:
    """Run each recorded unit alone on each device, forward and backward apart, and write down seconds and bytes.

    Units run as copies, one at a time, so the model may be larger than any device, and nothing of it changes:
    parameters, buffers, gradients, modes, hooks, and random numbers of all devices are as before. (Two things are not
    put back: the peaks that the allocators of accelerators count, and what user code in a unit changes outside of the
    unit.) Units that compute the same are measured once. Nothing of a unit is copied to a device where `may_run` does
    not let it be, and devices for which it refuses all units are not used. Each number is the median of a few
    repetitions after a first one that does not count. Then units run again, as many together as have room in some
    memory, in the order of a step: see `replay`. What was found so takes the place of what was found alone.

    Devices that the CPU plays, and devices that are not here, follow from the CPU; see `benches.bases`. The model's own
    code cannot be run apart: its forward is what the recording saw outside of units, the loss included, times what
    the units take on a device and over what they took in the recording. Its backward is taken to be as much if
    anything is trained. Autograd is taken to keep of it as much as units hand to it: the loss and activations do, sums
    do not. Where a unit cannot run alone, does not fit on a device, or time runs out, `fill.fill` estimates, and a
    note says so.

    Args:
        recording: A complete one, with values.
        inventory: The devices; with `training`, those that cannot train are left out.
        rows: Rows of the batches to come; None for those that were recorded. Measured are also a half, a quarter and
            an eighth of them, and one row.
        training: Whether to measure the backward too. The recorded call must have been one with gradients, since they
            go to the inputs that required them then.
        out_of_time: Asked before each measurement; what is left when it says yes is estimated.
        budget_s: Seconds after which that happens in any case. A measurement that has begun ends.
        call_overhead_s: What the runtime adds to each call of a stage; goes into the profile as it is.
        may_run: Whether parameters and inputs of a unit may be on a device, by the names of both; None: all may.
            Seconds of other pairs are estimated.

    Raises:
        ProfileError: The recording is not complete or had no values, or `rows` is below 1.
        InventoryError: No device of the inventory can train.
    """
    begun_s = time.monotonic()
    seen_rows = recording.rows
    rows = seen_rows if rows is None else rows
    if rows < 1:
        raise ProfileError(f"rows must be at least 1, got {rows}")
    if recording.shapes_only:
        raise ProfileError(
            "this recording has shapes without values (meta or fake tensors), and seconds cannot be measured with "
            "them. Record a call on a real batch, or use `estimate_profile`."
        )
    _ = inventory.root  # raises if none can train

    def stop() -> bool:
        return time.monotonic() - begun_s > budget_s or (out_of_time is not None and out_of_time())

    if any(device.emulated for device in inventory):
        keep_host_memory()
    basis_of = bases(inventory, training=training, dtype=_dtype(recording))
    allowed = Allowed(recording, basis_of, may_run)
    benches = allowed.benches
    jobs = {
        sort: Job(
            recording.module.get_submodule(sample.unit),
            sample,
            seen_rows,
            training,
            followers=[recording.module.get_submodule(name) for name in recording.followers.get(sample.unit, ())],
            instead=allowed.instead(sort),
        )
        for sort, sample in recording.samples.items()
    }
    with undisturbed(bench.device for bench in benches):
        optimizer_s, sum_s, notes = _optimizers(benches, _sizes(recording)) if training else ({}, {}, ())
        counts = row_counts(rows)
        _run(jobs, benches, counts, stop)
        for bench in benches:
            replay(jobs, allowed.units(bench), (bench,), counts, stop)
    return put_together(recording, inventory, jobs, basis_of, optimizer_s, sum_s, rows, call_overhead_s, notes)


def row_counts(rows: int) -> tuple[int, ...]:
    """The numbers of rows to measure at, rising: those of 1, 2, 4 and 8 equal micro-batches, and one row."""
    return tuple(sorted({1, *(rows // parts for parts in (1, 2, 4, 8) if rows >= parts)}))


def _run(
    jobs: Mapping[str, Job], benches: tuple[Bench, ...], counts: tuple[int, ...], stop: Callable[[], bool]
) -> None:
    """The ends of all curves first: when time runs out, rough numbers of all units beat fine ones of a few."""
    for some in dict.fromkeys(((counts[0], counts[-1]), counts)):
        for job in jobs.values():
            for bench in benches:
                if stop():
                    return
                job.measure(bench, tuple(dict.fromkeys(some)))


def _sizes(recording: Recording) -> list[int]:
    """Elements of each trained parameter."""
    return [parameter.numel() for parameter in recording.module.parameters() if parameter.requires_grad]


def _optimizers(
    benches: tuple[Bench, ...], sizes: list[int]
) -> tuple[dict[Bench, float], dict[Bench, float], tuple[str, ...]]:
    """Seconds of an optimizer step and of a sum of gradients, for each byte; notes on benches without an optimizer."""
    steps: dict[Bench, float] = {}
    sums: dict[Bench, float] = {}
    notes = []
    for bench in benches:
        try:
            with bench.use():
                steps[bench], sums[bench] = optimizer_s_per_byte(bench, sizes)
        except Exception as error:  # too little memory, an operator that is missing
            notes.append(
                f"An optimizer could not be timed on {bench.torch_device} and counts as on the slowest other device: "
                f"{first_line(error)}"
            )
    return steps, sums, tuple(notes)


def _dtype(recording: Recording) -> str:
    """Name of the dtype that most parameters have."""
    counts = Counter(str(p.dtype).removeprefix("torch.") for p in recording.module.parameters())
    return counts.most_common(1)[0][0] if counts else "float32"
