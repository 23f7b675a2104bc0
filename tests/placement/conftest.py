"""Made-up models with profiles, on made-up machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from lightning_hetero.devices import DeviceSpec, Inventory, Link
from lightning_hetero.graph import ModelGraph, Unit
from lightning_hetero.placement import Problem
from lightning_hetero.profile import Curve, Flow, Line, ModelProfile, UnitCost

Measured = Callable[..., Problem]


def measured_problem(
    work_s: Sequence[float],
    speeds: Sequence[float],
    *,
    memory: int | Sequence[int] = 1 << 30,
    rows: int = 16,
    parameter_bytes: int = 400,
    saved_bytes: float = 10.0,
    row_bytes: Sequence[float] = (4.0,),
    chained: bool = True,
    skips: Iterable[tuple[int, int]] = (),
    skip_bytes: float = 4.0,
    overhead_s: float = 0.0,
    launch_s: float = 0.0,
    bytes_per_s: float = 1e9,
    latency_s: float = 0.0,
    optimizer_s_per_byte: float = 0.0,
    **options: Any,
) -> Problem:
    """A model of units `u.0`, `u.1`, ..., each fed by the one before, on devices `dev:0`, `dev:1`, ...

    Args:
        work_s: Seconds of the forward of every unit for a whole batch on a device of speed 1; the backward takes twice.
        speeds: Of the devices.
        memory: Of each device.
        rows: Of the batch.
        parameter_bytes: Of every unit.
        saved_bytes: What every unit keeps of each row.
        row_bytes: What the batch, and then every unit, hands on of each row; used in turn.
        chained: Whether units hand it on straight from device to device.
        skips: Pairs of units between which something flows too, over the root.
        skip_bytes: How much, of each row.
        overhead_s: Of each call of a stage.
        launch_s: What each unit takes longer, however few rows there are.
        bytes_per_s: Of every link.
        latency_s: Of every link.
        optimizer_s_per_byte: On every device.
        options: More of the problem.
    """
    names = [f"dev:{index}" for index in range(len(speeds))]
    limits = [memory] * len(names) if isinstance(memory, int) else memory
    units = [f"u.{index}" for index in range(len(work_s))]
    graph = ModelGraph(
        units=tuple(
            Unit(
                name=name,
                kind="Linear",
                parameters=parameter_bytes // 4,
                parameter_bytes=parameter_bytes,
                trainable_bytes=parameter_bytes,
                buffer_bytes=0,
                tied_to=name,
            )
            for name in units
        )
    )
    inventory = Inventory(
        devices=tuple(
            DeviceSpec(name=name, kind="dev", memory_bytes=limit, torch_device=name, speed=speed)
            for name, limit, speed in zip(names, limits, speeds, strict=True)
        ),
        links=tuple(
            Link(source=a, target=b, bandwidth_bytes_per_s=bytes_per_s, latency_s=latency_s)
            for a in names
            for b in names
            if a != b
        ),
    )

    def curve(seconds: float, speed: float) -> Curve:
        return Curve(((1, seconds / rows / speed + launch_s), (max(rows, 2), seconds / speed + launch_s)))

    costs = tuple(
        UnitCost(
            name=name,
            forward_s={d: curve(seconds, speed) for d, speed in zip(names, speeds, strict=True)},
            backward_s={d: curve(2 * seconds, speed) for d, speed in zip(names, speeds, strict=True)},
            saved_bytes=Line(0, saved_bytes),
        )
        for name, seconds in zip(units, work_s, strict=True)
    )
    lines = [Line(0, row_bytes[index % len(row_bytes)]) for index in range(len(units) + 1)]
    flows = [Flow(source="", target=units[0], size_bytes=lines[0], has_gradient=False)]
    flows += [
        Flow(source=one, target=other, size_bytes=line, chained=chained)
        for one, other, line in zip(units, units[1:], lines[1:], strict=False)
    ]
    flows.append(Flow(source=units[-1], target="", size_bytes=lines[-1]))
    flows += [Flow(source=units[a], target=units[b], size_bytes=Line(0, skip_bytes)) for a, b in skips]
    profile = ModelProfile(
        model=graph.fingerprint,
        rows=rows,
        units=costs,
        flows=tuple(flows),
        optimizer_s_per_byte=dict.fromkeys(names, optimizer_s_per_byte),
        call_overhead_s=overhead_s,
    )
    return Problem(graph=graph, inventory=inventory, profile=profile, **options)


@pytest.fixture(scope="session")
def measured() -> Measured:
    """Makes problems, see `measured_problem`."""
    return measured_problem
