"""Turns an assignment of units to devices into a plan, and prices it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.graph.model import ModelGraph, Unit
from lightning_hetero.plan.plan import Alternative, Execution, Forecast, MemoryNeed, Plan, Share, Stage


def build_plan(
    graph: ModelGraph,
    inventory: Inventory,
    device_of: Mapping[str, str],
    *,
    policy: str,
    shares_of: Mapping[str, tuple[Share, ...]] | None = None,
    notes: Iterable[str] = (),
    training: bool = True,
    optimizer_factor: float = 0.0,
    execution: Execution | None = None,
    forecast: Forecast | None = None,
    proof: str = "",
    alternatives: Iterable[Alternative] = (),
    objective: str = "step_time",
    seed: int = 0,
) -> Plan:
    """Cut the units, in order, into runs on one device.

    Args:
        graph: The model.
        inventory: The devices to choose from.
        device_of: Device name of every unit of `graph`.
        policy: Name of the policy that decided.
        shares_of: The replicas of units that stand on several devices, the owner first.
        notes: Its reasons.
        training: Whether gradients and optimizer state are needed.
        optimizer_factor: Bytes of optimizer state for each byte of trained parameter.
        execution: How a batch runs; None: whole.
        forecast: What that will take.
        proof: What is known about how good the plan is.
        alternatives: What was rejected, the best first.
        objective: What was minimised.
        seed: Of whatever was random in the search.
    """
    stages = []
    shares_of = shares_of or {}
    for (device, shares), run in groupby(
        graph.units, key=lambda unit: (device_of[unit.name], shares_of.get(unit.name, ()))
    ):
        units = tuple(run)
        need = sum((unit_need(unit, training, optimizer_factor) for unit in units), MemoryNeed())
        stages.append(
            Stage(
                device=device,
                units=tuple(unit.name for unit in units),
                parameters=sum(unit.parameters for unit in units),
                need=need,
                shares=shares,
            )
        )
    return Plan(
        policy=policy,
        devices=inventory.devices,
        stages=tuple(stages),
        loose=loose_need(graph, training, optimizer_factor),
        notes=tuple(notes),
        model=graph.fingerprint,
        optimizer_factor=optimizer_factor,
        training=training,
        execution=execution or Execution(),
        forecast=forecast,
        proof=proof,
        alternatives=tuple(alternatives),
        objective=objective,
        seed=seed,
    )


def unit_need(unit: Unit, training: bool, optimizer_factor: float) -> MemoryNeed:
    """What one unit keeps on its device."""
    return _need(unit.parameter_bytes, unit.trainable_bytes, unit.buffer_bytes, training, optimizer_factor)


def loose_need(graph: ModelGraph, training: bool, optimizer_factor: float) -> MemoryNeed:
    """What the root holds besides its units."""
    return _need(
        graph.loose_parameter_bytes,
        graph.loose_trainable_bytes,
        graph.loose_buffer_bytes,
        training,
        optimizer_factor,
    )


def _need(
    parameter_bytes: int, trainable_bytes: int, buffer_bytes: int, training: bool, optimizer_factor: float
) -> MemoryNeed:
    return MemoryNeed(
        parameters_bytes=parameter_bytes,
        gradients_bytes=trainable_bytes if training else 0,
        optimizer_bytes=int(trainable_bytes * optimizer_factor) if training else 0,
        buffers_bytes=buffer_bytes,
    )
