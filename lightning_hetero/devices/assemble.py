"""The items of a request put together: devices in the order asked for, and the links between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from lightning_hetero.devices.emulated import KIND as EMULATED
from lightning_hetero.devices.emulated import Emulation
from lightning_hetero.devices.here import Here
from lightning_hetero.devices.limits import check_fits
from lightning_hetero.devices.links import links_between
from lightning_hetero.devices.lookup import refusal
from lightning_hetero.devices.records import device_from_record
from lightning_hetero.devices.request import Item, split_request
from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError


def devices_of(parts: Iterable[object], here: Here, *, must_exist: bool) -> list[DeviceSpec]:
    """The devices that the parts of a request mean, one part after the other.

    Args:
        parts: Texts, `torch.device`s, `DeviceSpec`s and mappings.
        here: Where names are looked up, and whose CPU plays the emulated devices.
        must_exist: Whether a described device is one of `here`, and may leave out what is known of it.

    Raises:
        InventoryError: A part is wrong or means no device.
    """
    items = split_request(parts)
    numbered = _free_names(items)
    devices: list[DeviceSpec] = []
    for item in items:
        if isinstance(item, str):
            devices += here.find(item)
        elif isinstance(item, Emulation):
            devices.append(item.device(item.name or next(numbered), here.cpu))
        elif isinstance(item, DeviceSpec):
            devices.append(item)
        else:
            real = partial(_required, here=here) if must_exist else _nothing_is_here
            devices.append(device_from_record(item, cpu=lambda: here.cpu, real=real, next_name=numbered.__next__))
    return devices


def put_together(devices: Sequence[DeviceSpec], here: Here) -> Inventory:
    """An inventory of these devices, with what `here` knows of the links between them.

    Raises:
        InventoryError: There is no device, or one is named twice.
    """
    if not devices:
        raise no_device(here)
    names = [device.name for device in devices]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refusal(f"device {twice!r} is asked for twice", here.inventory, "Name it once")
    on_host = all(device.torch_device in ("cpu", None) for device in devices)
    source = here.host if on_host else here.inventory
    return Inventory(
        devices=tuple(devices),
        links=links_between(devices, known=source.links),
        host=source.host,
        numa_nodes=source.numa_nodes,
    )


def on_this_machine(inventory: Inventory, here: Here) -> Inventory:
    """The inventory with torch's exact names, once every trainable device of it is found here.

    Raises:
        InventoryError: A device does not exist, is listed under two names, has less memory than is
            claimed, or none can train.
    """
    devices = tuple(_real(device, here) for device in inventory)
    owners: dict[str, str] = {}
    for device in devices:
        if device.trainable and not device.emulated:
            owner = owners.setdefault(str(device.torch_device), device.name)
            if owner != device.name:
                raise InventoryError(
                    f"devices {owner!r} and {device.name!r} are both {device.torch_device!r} to torch; "
                    "leave one of them out"
                )
    inventory = replace(inventory, devices=devices)
    _ = inventory.root  # raises if none can train
    return inventory


def no_device(here: Here) -> InventoryError:
    """The error for a request of nothing."""
    return refusal("no device is asked for", here.inventory, "Write 'auto' for all of them, or at least one name")


def _real(device: DeviceSpec, here: Here) -> DeviceSpec:
    if device.emulated or not device.trainable or device.torch_device is None:
        return device
    found = _required(device.torch_device, here)
    check_fits(device, device.memory_bytes, found)
    return replace(device, torch_device=found.torch_device)


def _required(torch_device: str, here: Here) -> DeviceSpec:
    found = here.real(torch_device)
    if found is None:
        raise refusal(
            f"device {torch_device!r} is not available",
            here.inventory,
            "To plan for hardware that is elsewhere, pass must_exist=False; to train, use the devices listed",
        )
    return found


def _nothing_is_here(torch_device: str) -> None:
    """What this machine knows of a device of another one."""


def _free_names(items: Sequence[Item]) -> Iterator[str]:
    """Names for unnamed emulated devices, "emulated:0" on, without those that the items use themselves."""
    taken = {_name(item) for item in items}
    return (name for index in count() if (name := f"{EMULATED}:{index}") not in taken)


def _name(item: Item) -> object:
    if isinstance(item, str):
        return item
    return item.get("name") if isinstance(item, Mapping) else item.name
