"""A profile from sizes alone, for plans that are made before the model was seen at work. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.profile.costs import OWN_CODE, Curve, Flow, ModelProfile, UnitCost

# What a device of speed 1.0 is taken to compute, where no data sheet says better. Only the ratios matter for where
# units go; the level decides how much transfers weigh against them.
_FLOPS_PER_S = 1e11
_BYTES_PER_S = 1e10
ADAM_ACCESSES = 7  # of each byte: weight, two averages read and written, gradient read
_DTYPE = "float32"
_DTYPE_BYTES = 4


def estimate_profile(
    graph: ModelGraph,
    inventory: Inventory,
    *,
    rows: int,
    training: bool = True,
    flows: Iterable[Flow] = (),
    calls: Iterable[str] = (),
    call_overhead_s: float = 0.0,
) -> ModelProfile:
    """Costs from sizes: each parameter is multiplied and added once for each row (6 operations with the backward).

    That is right for a linear layer on one row, too little for convolutions and sequences, and in proportion among
    layers of one sort. A pass also reads the parameters once, and starts once. `flops_per_s`, `memory_bytes_per_s` and
    `launch_s` of a device are used where the inventory has them, and else its relative speed.

    Args:
        graph: The units.
        inventory: The devices; with `training`, those that cannot train are left out.
        rows: Rows of a batch.
        training: Whether the model is trained.
        flows: What passes between units, if a recording on shapes has told.
        calls: Names of the units that were called, in order, likewise; without them, all units once.
        call_overhead_s: What the runtime adds to each call.

    Raises:
        ProfileError: `rows` is below 1.
    """
    if rows < 1:
        raise ProfileError(f"rows must be at least 1, got {rows}")
    names = tuple(calls) or graph.names
    devices = inventory.trainable if training else tuple(inventory)
    units = []
    for name in dict.fromkeys(names):
        unit, count = graph[name], names.count(name)
        forward = {d.name: _curve(d, unit.parameter_bytes, rows, count) for d in devices}
        passes = 2 if unit.trainable_bytes else 1  # gradients of weights and inputs, or of inputs alone
        backward = {name: curve.scaled(passes) for name, curve in forward.items()} if training else {}
        units.append(UnitCost(name=unit.name, calls=count, forward_s=forward, backward_s=backward))
    nothing = Curve(((1, 0.0),))
    own = UnitCost(
        name=OWN_CODE,
        forward_s={d.name: nothing for d in devices},
        backward_s={d.name: nothing for d in devices} if training else {},
    )
    return ModelProfile(
        model=graph.fingerprint,
        rows=rows,
        units=tuple(units),
        own_code=own,
        flows=tuple(flows),
        optimizer_s_per_byte={d.name: ADAM_ACCESSES / _bytes_per_s(d) for d in devices} if training else {},
        call_overhead_s=call_overhead_s,
        estimated=True,
        notes=("All seconds are estimates from the sizes of parameters; nothing was run.",),
    )


def _curve(device: DeviceSpec, parameter_bytes: int, rows: int, calls: int) -> Curve:
    operations = 2 * parameter_bytes / _DTYPE_BYTES * calls
    fixed_s = calls * (parameter_bytes / _bytes_per_s(device) + (device.launch_s or 0.0))
    per_row_s = operations / _flops_per_s(device)
    return Curve(tuple((count, fixed_s + per_row_s * count) for count in sorted({1, max(2, rows)})))


def _flops_per_s(device: DeviceSpec) -> float:
    return flops_per_s(device, _DTYPE) or _FLOPS_PER_S * device.speed


def _bytes_per_s(device: DeviceSpec) -> float:
    return device.memory_bytes_per_s or _BYTES_PER_S * device.speed


def flops_per_s(device: DeviceSpec, dtype: str) -> float | None:
    """Floating-point operations per second of a device for a dtype, or else for the first one that it lists."""
    by_dtype = dict(device.flops_per_s)
    return by_dtype.get(dtype, next(iter(by_dtype.values()), None))
