"""How users ask for devices: any reasonable spelling to an inventory, or an error that says what to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from lightning_hetero.devices.assemble import devices_of, no_device, on_this_machine, put_together
from lightning_hetero.devices.described import described_inventory
from lightning_hetero.devices.files import SUFFIXES, read_inventory_file
from lightning_hetero.devices.here import Here
from lightning_hetero.devices.limits import limit_memory
from lightning_hetero.devices.lookup import refusal
from lightning_hetero.devices.presets import is_preset_request, preset_inventory
from lightning_hetero.devices.request import FORMS, torch_name
from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError

if TYPE_CHECKING:
    import torch

DeviceRequest: TypeAlias = Union[
    "str",
    "int",
    "PathLike[str]",
    "torch.device",
    "DeviceSpec",
    "Inventory",
    "Sequence[Any]",
    "Mapping[Any, Any]",
    "None",
]


def resolve_devices(
    request: DeviceRequest = None,
    *,
    memory: Mapping[Any, Any] | None = None,
    discovered: Inventory | None = None,
    must_exist: bool = True,
) -> Inventory:
    """The inventory that a user asks for, in the order in which it is asked for.

    Args:
        request: What to use.

            * None, "auto", -1: all trainable devices; a number n: the first n of them.
            * "cuda:0,cpu", ["cuda:0", torch.device("cpu")], "cuda:*", "cuda:0-3", "cuda" if there is one;
              "gpu" stands for cuda or else the accelerator that exists, "tpu" for xla.
            * "cpu@speed=1,mem=2GiB,threads=1": a device that the CPU plays; may stand in lists.
            * {"cuda:0": "10GiB", "cpu": None}: these devices under these limits.
            * "my.yaml", a path: an inventory file; {"devices": [...]}: its content.
            * {"name": ..., "kind": ..., "memory": ...}, also in lists: a device, described.
            * "2xrtx4090+1xa100-80gb", "2x24GiB+1x12GiB": hardware by its data sheet or memory, to plan for;
              "+cpu" or "+cpu-64GiB" adds a CPU.
            * A `DeviceSpec`, an `Inventory`.
        memory: Limits by device, `{"cuda:0": "10GiB"}`.
        discovered: The devices to choose from; None discovers those of this machine.
        must_exist: Whether the devices will train here: then one that this machine does not have is an
            error. False plans for other hardware, which must then be described in full.

    Raises:
        InventoryError: The request cannot be met; the text says what exists and what to write.
    """
    here = Here(discovered)
    inventory = _read(request, here, must_exist)
    if must_exist:
        inventory = on_this_machine(inventory, here)
    return inventory if memory is None else limit_memory(inventory, memory)


def _read(request: object, here: Here, must_exist: bool) -> Inventory:
    if isinstance(request, str):
        request = request.strip()
    if isinstance(request, Inventory):
        return request
    if request is None or (isinstance(request, (str, Integral)) and request in ("auto", -1, "-1")):
        return put_together(here.inventory.trainable, here)
    count = _count(request)
    if count is not None:
        return _first(count, here)
    if isinstance(request, PathLike) or (isinstance(request, str) and request.lower().endswith(SUFFIXES)):
        return _from_file(request, here, must_exist)
    if isinstance(request, Mapping):
        return _from_mapping(request, here, must_exist)
    if isinstance(request, str) and is_preset_request(request):
        return _from_preset(request, here, must_exist)
    return _choose(_parts(request), here, must_exist)


def _choose(parts: list[object], here: Here, must_exist: bool) -> Inventory:
    return put_together(devices_of(parts, here, must_exist=must_exist), here)


def _from_file(path: str | PathLike[str], here: Here, must_exist: bool) -> Inventory:
    data = read_inventory_file(path)
    return described_inventory(data, here, must_exist=must_exist, origin=f"the file {str(path)!r}")


def _from_preset(request: str, here: Here, must_exist: bool) -> Inventory:
    inventory = preset_inventory(request, here)
    if must_exist:
        raise InventoryError(
            f"{request!r} describes hardware by its data sheet, which can be planned for but not trained on. Pass "
            "must_exist=False to plan, or name devices of this machine, such as 'cuda:0,cpu'"
        )
    return inventory


def _count(request: object) -> int | None:
    """The number of devices, if that is what the request is."""
    if isinstance(request, bool):
        raise InventoryError(f"devices={request} is neither a number of devices nor a name. {FORMS}.")
    if isinstance(request, Integral):
        return int(request)
    if isinstance(request, str) and re.fullmatch(r"[+-]?\d+", request):
        return int(request)
    return None


def _first(count: int, here: Here) -> Inventory:
    devices = here.inventory.trainable
    if count == 0:
        raise no_device(here)
    if count < 0:
        raise refusal(f"{count} is not a number of devices", here.inventory, "Write -1 for all of them")
    if count > len(devices):
        raise refusal(
            f"{count} devices are asked for, but there are {len(devices)}",
            here.inventory,
            f"Write at most {len(devices)}, or emulate more: 'cpu@speed=1,mem=2GiB'",
        )
    return put_together(devices[:count], here)


def _parts(request: object) -> list[object]:
    if isinstance(request, (str, DeviceSpec)) or torch_name(request) is not None:
        return [request] if request else []
    if isinstance(request, Sequence) and not isinstance(request, (bytes, bytearray)):
        return list(request)
    raise InventoryError(f"devices={request!r} is not a device request. {FORMS}.")


def _from_mapping(request: Mapping[Any, Any], here: Here, must_exist: bool) -> Inventory:
    if "devices" in request:
        return described_inventory(request, here, must_exist=must_exist, origin="the inventory")
    if "kind" in request or "name" in request:
        return _choose([request], here, must_exist)
    limits = {address: size for address, size in request.items() if size is not None}
    emulated = [address for address in limits if "@" in str(address)]
    if emulated:
        raise InventoryError(
            f"{emulated[0]!r} is an emulated device; write its memory into it: "
            f"'{emulated[0]},mem={limits[emulated[0]]}'"
        )
    return limit_memory(_choose(list(request), here, must_exist), limits)
