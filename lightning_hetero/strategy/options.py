"""Reads what users wrote: policies by name, device maps, and defaults from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.devices.split import devices_of_process
from lightning_hetero.errors import InventoryError, PlacementError, UsageError
from lightning_hetero.placement import Constraints, ManualPolicy, PlacementPolicy, get_policy
from lightning_hetero.plan.forecast import MOST_MICRO_BATCHES
from lightning_hetero.schedule import Schedule, get_schedule

DEVICES_VARIABLE = "HETERO_DEVICES"
PLACEMENT_VARIABLE = "HETERO_PLACEMENT"
MICRO_BATCHES_VARIABLE = "HETERO_MICRO_BATCHES"
BATCH_NORMS = ("whole", "defer")
"""What `batch_norm` may be."""


def as_policy(placement: Any) -> PlacementPolicy:
    """The policy that a user's `placement` means.

    Args:
        placement: Name of a policy, a mapping of module name to device (or to shares of devices), a policy, a class or
            function that makes one, or None for the environment variable HETERO_PLACEMENT and else "auto".

    Raises:
        PlacementError: It is none of these.
    """
    if placement is None:
        placement = os.environ.get(PLACEMENT_VARIABLE) or "auto"
    if isinstance(placement, str):
        return get_policy(placement)
    if isinstance(placement, Mapping):
        return ManualPolicy({str(key): _device(value) for key, value in placement.items()})
    if callable(placement) and (isinstance(placement, type) or not hasattr(placement, "place")):
        placement = placement()
    if isinstance(placement, PlacementPolicy):
        return placement
    raise PlacementError(
        f"placement={placement!r} is neither the name of a policy, nor a mapping of module name to device, nor an "
        "object with a `name` and a method `place(problem)`."
    )


def as_constraints(given: Any) -> Constraints:
    """The rules that a user's `constraints` mean.

    Args:
        given: `Constraints`, a mapping of its fields, or None for none.

    Raises:
        PlacementError: It is none of these, or has a field that does not exist or has no such type.
    """
    if given is None:
        return Constraints()
    if isinstance(given, Constraints):
        return given
    known = [field.name for field in fields(Constraints)]
    strange = sorted(set(given) - set(known)) if isinstance(given, Mapping) else [given]
    if strange:
        raise PlacementError(f"constraints: {strange[0]!r} is not known; it is a mapping of {', '.join(known)}")
    rules: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        wanted = Mapping if name == "pins" else (list, tuple)
        if not isinstance(value, wanted):
            what = "a mapping of module to device" if name == "pins" else "a list"
            raise PlacementError(f"constraints: {name}={value!r} has to be {what}")
        rules[name] = dict(value) if name == "pins" else tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return Constraints(**rules)


def requested_inventory(
    devices: Any,
    host_devices: Sequence[torch.device],
    memory: Mapping[str, Any],
    place: tuple[int, int] = (0, 1),
) -> Inventory:
    """The devices that the user wants, wherever the wish was written.

    The strategy's own `devices` come first, then those of `Trainer(accelerator="hetero", devices=...)`, then the
    environment variable HETERO_DEVICES, and then what the host's accelerator stands for.

    Args:
        devices: The strategy's argument.
        host_devices: What the host hands over.
        memory: Limits by device name.
        place: Which of the processes on this machine this one is, and how many there are. They share what "auto", a
            number or the host's accelerator stand for; devices by name are for this process alone.

    Raises:
        InventoryError: The request cannot be met.
    """
    found = getattr(host_devices, "inventory", None)
    if devices is None and found is None:
        devices = os.environ.get(DEVICES_VARIABLE)
    if devices is not None:
        inventory = resolve_devices(devices, memory=memory)
        return devices_of_process(inventory, *place) if devices == "auto" or isinstance(devices, int) else inventory
    if found is not None:
        return devices_of_process(resolve_devices(found, memory=memory), *place)
    return devices_of_process(resolve_devices(_meant_by_host(host_devices), memory=memory), *place)


def number_of_micro_batches(given: int | None) -> int | None:
    """How many micro-batches a batch is cut into; None leaves it to the plan.

    Args:
        given: The strategy's argument; None for the environment variable HETERO_MICRO_BATCHES.

    Raises:
        UsageError: It is not a whole number from 1 on, or far too large.
    """
    value: Any = given
    if given is None:
        value = os.environ.get(MICRO_BATCHES_VARIABLE)
        if not value:
            return None
        if value.strip().isdigit():
            value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_MICRO_BATCHES:
        source = "micro_batches" if given is not None else MICRO_BATCHES_VARIABLE
        raise UsageError(
            f"{source}={value!r} must be a whole number from 1 on, at most {MOST_MICRO_BATCHES}: the number of parts "
            "of a batch"
        )
    return value


def positive_seconds(name: str, value: Any) -> float:
    """A length of time.

    Raises:
        UsageError: It is no number above 0.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{name}={value!r} must be a number of seconds above 0")
    return float(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """A word.

    Raises:
        UsageError: It is none of the allowed ones.
    """
    if value not in allowed:
        raise UsageError(f"{name}={value!r} is not known; it may be {' or '.join(map(repr, allowed))}")
    return str(value)


def yes_no_or_auto(name: str, value: Any) -> bool | None:
    """True, False, or None for "auto".

    Raises:
        UsageError: It is none of these.
    """
    if isinstance(value, bool):
        return value
    if value == "auto":
        return None
    raise UsageError(f"{name}={value!r} is not known; it may be True, False or 'auto'")


def may_checkpoint(activation_checkpointing: Any, compile: Any, rematerialize: Any) -> bool:
    """Whether these options leave it to a plan to take to activation checkpointing where nothing else fits."""
    return activation_checkpointing in (None, True) and compile is None and rematerialize is not True


def schedule_for(name: str | None, micro_batching: str) -> Schedule:
    """The schedule of that name; None for "1f1b".

    Raises:
        ScheduleError: No schedule has that name.
        UsageError: The schedule cannot be followed.
    """
    schedule = get_schedule(name or "1f1b")
    if name is not None and micro_batching != "step":
        raise UsageError(
            f"schedule={name!r} orders whole training steps; set micro_batching='step' too. With "
            "micro_batching='forward' the loss needs the whole batch, so all forwards come first."
        )
    if schedule.splits_backward:
        raise UsageError(
            f"schedule={name!r} splits backwards in two, which only the simulator can do; take '1f1b' instead"
        )
    return schedule


def _meant_by_host(host_devices: Sequence[torch.device]) -> Inventory:
    """What "auto", "gpu" or "cpu" of the host mean.

    Lightning hands over `[cpu]` for `accelerator="auto"` on a machine without a GPU, and for
    `accelerator="cpu"` on any. It knows no accelerators but CUDA, MPS and TPU. So `[cpu]` is taken for "auto", that is
    everything, unless the machine has a CUDA or MPS device that "auto" would have chosen.
    """
    everything = resolve_devices(None)
    kinds = {device.type for device in host_devices}
    chosen_by_auto = {device.kind for device in everything} & {"cuda", "mps"}
    if kinds <= {"cpu"}:
        if not chosen_by_auto:
            return everything
        return _only(everything, lambda name, kind: kind == "cpu")
    names = {str(device) for device in host_devices}
    return _only(everything, lambda name, kind: kind not in kinds or name in names)


def _only(inventory: Inventory, keep: Any) -> Inventory:
    names = [device.name for device in inventory if keep(device.name, device.kind)]
    if not names:
        raise InventoryError(f"none of the devices is wanted; there are: {', '.join(inventory.names)}")
    return resolve_devices(names, discovered=inventory)


def _device(value: Any) -> str | int | Mapping[str, float]:
    if isinstance(value, Mapping):  # replicas
        return {str(device): share for device, share in value.items()}
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)


def shares_of_processes(shares: Sequence[float] | None) -> tuple[float, ...]:
    """The shares of a batch that processes get; empty if all get the same.

    Raises:
        UsageError: One of them is no number above 0.
    """
    found = tuple(shares or ())
    for share in found:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < float("inf"):
            raise UsageError(
                f"shares has to be one number above 0 for each process, such as [3, 1], got {share!r} in {list(found)}"
            )
    return tuple(map(float, found))
