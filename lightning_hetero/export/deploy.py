"""Plans where the stages of an exported model are to run: for the time of one batch, or for a stream of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_hetero.devices.presets import with_assumptions
from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import TargetError
from lightning_hetero.export.operators import Asked, asked_by_units
from lightning_hetero.export.placed import unit_finder
from lightning_hetero.export.targets import family_names
from lightning_hetero.export.targets.prepared import Limits, limits
from lightning_hetero.export.trace import arguments, trace
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement.make import make_plan
from lightning_hetero.placement.policy import PlacementPolicy, get_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.forecast import WHOLE
from lightning_hetero.plan.plan import Plan
from lightning_hetero.profile.count import count_work
from lightning_hetero.profile.structure import all_tensors, map_tensors


def plan_deployment(
    module: nn.Module,
    example_inputs: object,
    inventory: Inventory,
    *,
    objective: str = "latency",
    policy: str | PlacementPolicy = "auto",
    convert_precision: bool = False,
    time_limit_s: float = 10.0,
) -> Plan:
    """Decide which unit of a trained model is to run on which device once it is exported.

    Seconds are estimates from operations, bytes, and the rates of the devices; the plan says which are assumed. Give
    the plan to `export` as its `placement`, with `targets="auto"`.

    Args:
        module: The module.
        example_inputs: As for `export`. A batch of its size is what the plan is for: one row for the latency of one
            sample, as many as a batch of the stream has for throughput.
        inventory: The devices. Those that cannot train are deployment targets, named as `export` names them
            ("dla:0", "openvino:NPU"). At least one that torch can train on, such as the CPU, hands batches in and out.
        objective: "latency": seconds of one batch through all stages. "throughput": seconds from one batch of a
            stream to the next, with every stage at work on another one. "peak_memory": the fullest device.
        policy: Who decides.
        convert_precision: Whether stages may go to devices that do not compute with the model's dtype, so that the
            tools of their vendors convert it (float16, int8). Results are no longer those of the model then.
        time_limit_s: Seconds that the search may take.

    Raises:
        UnsupportedError: The module cannot be captured, see `trace`.
        ProfileError: The module cannot be called on shapes.
        PlacementError: No device is left for some unit; the message says why each refuses it.
        InfeasiblePlanError: Nothing fits.
    """
    graph = find_units(module)
    inventory, assumptions = with_assumptions(inventory)
    problem = Problem(graph=graph, inventory=inventory, training=False, optimizer_factor=0.0, objective=objective)
    problem = as_deployment(problem, module, example_inputs, convert_precision=convert_precision)
    args, kwargs = arguments(example_inputs)
    rows = next((len(tensor) for tensor in all_tensors((args, kwargs)) if tensor.ndim), 1)
    work = count_work(module, graph, args, kwargs, rows=rows, training=False)
    end_s = time.monotonic() + time_limit_s
    problem = replace(
        problem,
        profile=work.profile(graph, inventory),
        time_limit_s=time_limit_s,
        out_of_time=lambda: time.monotonic() > end_s,
    )
    plan = make_plan(get_policy(policy) if isinstance(policy, str) else policy, problem)
    return replace(plan, notes=(*plan.notes, *converted(plan, work.dtype), *assumptions))


def as_deployment(
    problem: Problem, module: nn.Module, example_inputs: object, *, convert_precision: bool = False
) -> Problem:
    """The problem of placing an exported model: all devices may be used, for the units that they take.

    Args:
        problem: One of inference.
        module: The model; on "meta" is enough.
        example_inputs: See `export`; one row is enough.
        convert_precision: See `plan_deployment`.

    Raises:
        UnsupportedError: The module cannot be captured, see `trace`.
        TargetError: The name of a device that cannot train is no target.
    """
    problem = replace(problem, deployment=True, schedules=(WHOLE,))
    for device in problem.candidates:
        target_of(device)
    program = trace(module, _beside(module, example_inputs), dynamic_batch=False).program
    asked = asked_by_units(program, unit_finder(problem.graph), problem.graph.names)
    unable = [device for device in problem.candidates if not device.trainable]
    refused = {device.name: _refused(device, asked, convert_precision) for device in unable}
    return replace(problem, refused={name: units for name, units in refused.items() if units})


def target_of(device: DeviceSpec) -> str:
    """The target of `export` that a device of an inventory is.

    Raises:
        TargetError: It is none.
    """
    if device.name.partition(":")[0] in family_names():
        return device.name
    if device.torch_device is not None:
        return f"torch:{device.torch_device}"
    raise TargetError(
        f"device {device.name!r} is no target of export. What is no device of torch needs the name of a target, "
        f"family:device, with one of the families {', '.join(family_names())}."
    )


def _beside(module: nn.Module, example_inputs: object) -> object:
    """Inputs without values for a module without, and with some for one with."""
    is_meta = any(parameter.is_meta for parameter in module.parameters())

    def place(tensor: Tensor) -> Tensor:
        if tensor.is_meta == is_meta:
            return tensor
        return torch.zeros_like(tensor, device="meta" if is_meta else "cpu")

    return map_tensors(example_inputs, place)


def _refused(device: DeviceSpec, asked: Mapping[str, Asked], convert_precision: bool) -> dict[str, str]:
    """The units that a device does not take, each with the reason."""
    limit = _limit(device)
    precisions = _precisions(device)
    found = {}
    for unit, needs in asked.items():
        lacking = limit.lacking(needs.operators) if limit is not None and "," not in device.name else []
        strange = sorted(needs.dtypes - {*precisions}) if precisions and not convert_precision else []
        if lacking:
            found[unit] = f"has no {', '.join(lacking)}"
        elif strange:
            found[unit] = (
                f"computes in {', '.join(precisions)} and not in {', '.join(strange)} "
                "(convert_precision=true lets its tools convert)"
            )
    return found


def _limit(device: DeviceSpec) -> Limits | None:
    """What is known of the hardware; a target such as "dla:0,GPU" has all operators, since another device helps."""
    return limits().get(device.name.partition(":")[0])


def converted(plan: Plan, dtype: str) -> Iterator[str]:
    """A sentence for every device of a plan that computes with other dtypes than the model."""
    for device in plan.used:
        precisions = _precisions(device)
        if not device.trainable and precisions and dtype not in precisions:
            yield (
                f"{device.name} computes in {', '.join(precisions)}: the tools of its vendor convert the {dtype} of "
                "its stages, and results are no longer exactly those of the model."
            )


def _precisions(device: DeviceSpec) -> tuple[str, ...]:
    limit = _limit(device)
    return device.dtypes or (limit.precisions if limit is not None else ())
