"""Finding devices of an inventory by what people call them: "cuda:1", "cuda:*", "cuda:0-3", "gpu", "cpu"."""

from __future__ import annotations

import re
from difflib import get_close_matches

from lightning_hetero.devices.emulated import EMULATION_HELP, TORCH_KINDS
from lightning_hetero.devices.emulated import KIND as EMULATED
from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError
from lightning_hetero.units import format_bytes

_ADDRESS = re.compile(r"([A-Za-z][\w-]*)(?::(?:(\*)|(\d{1,6})(?:-(\d{1,6}))?))?")


def find(address: str, inventory: Inventory) -> tuple[DeviceSpec, ...]:
    """The devices that `address` means, in the inventory's order; exact names win.

    Args:
        address: A name of the inventory; "kind:index"; "kind" if there is one of it; "kind:*" for all of
            it; "kind:first-last". "gpu" stands for cuda or else the accelerator that exists, "tpu" for xla.
        inventory: The devices to choose from.

    Returns:
        At least one device.

    Raises:
        InventoryError: No or no single device is meant.
    """
    if address in inventory:
        return (inventory[address],)
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise refusal(f"{address!r} does not name a device", inventory, _how_to_write(inventory))
    word, star, first, last = match.groups()
    kind = _kind(word, inventory)
    same = tuple(device for device in inventory if device.kind == kind)
    if not same:
        raise _no_such_kind(address, kind, inventory)
    if star:
        return same
    if first is None:
        return _only(address, kind, same, inventory)
    return _by_index(address, kind, range(int(first), int(last or first) + 1), inventory)


def refusal(problem: str, inventory: Inventory, advice: str) -> InventoryError:
    """An error that says what was wrong, what there is and what to write."""
    return InventoryError(f"{problem}. Available: {listing(inventory)}. {advice}.")


def listing(inventory: Inventory) -> str:
    """The devices with their memory, for messages: "cuda:0 (23.5 GiB), cpu (60.0 GiB)"."""
    return ", ".join(f"{d.name} ({format_bytes(d.memory_bytes)})" for d in inventory) or "no device"


def _kind(word: str, inventory: Inventory) -> str:
    if word == "tpu":
        return "xla"
    if word != "gpu":
        return word
    kinds = [d.kind for d in inventory.trainable if d.kind != "cpu" and not d.emulated]
    return "cuda" if "cuda" in kinds else next(iter(kinds), "cuda")


def _only(address: str, kind: str, same: tuple[DeviceSpec, ...], inventory: Inventory) -> tuple[DeviceSpec, ...]:
    if len(same) == 1:
        return same
    raise refusal(
        f"{address!r} is ambiguous: there are {len(same)} devices of kind {kind!r}",
        inventory,
        f"Write {same[0].name!r} for one of them, or '{kind}:*' for all of them",
    )


def _by_index(address: str, kind: str, indices: range, inventory: Inventory) -> tuple[DeviceSpec, ...]:
    if not indices:
        raise refusal(f"{address!r} is an empty range", inventory, "Write the smaller index first: 'cuda:0-3'")
    by_index = {_index(device): device for device in reversed(inventory.devices) if device.kind == kind}
    missing = next((index for index in indices if index not in by_index), None)
    if missing is None:
        return tuple(by_index[index] for index in indices)
    part = "" if len(indices) == 1 else f" of {address!r}"
    raise refusal(f"device '{kind}:{missing}'{part} is not available", inventory, _how_to_write(inventory))


def _index(device: DeviceSpec) -> int:
    """The number after the colon, of the name or else of torch's name; 0 for a device without numbers."""
    for name in (device.name, "" if device.emulated else device.torch_device or ""):
        kind, _, digits = name.rpartition(":")
        if kind == device.kind and digits.isdecimal():
            return int(digits)
    return 0


def _no_such_kind(address: str, kind: str, inventory: Inventory) -> InventoryError:
    if kind in TORCH_KINDS:
        return refusal(
            f"device {address!r} is not available: torch sees no device of kind {kind!r}",
            inventory,
            f"{_how_to_write(inventory)}, or install the torch build and driver for {kind!r}",
        )
    if kind == EMULATED:
        return refusal(f"there is no device {address!r}", inventory, f"Emulated devices are made: {EMULATION_HELP}")
    words = dict.fromkeys((*inventory.names, *(d.kind for d in inventory), *TORCH_KINDS, "gpu", "tpu", "auto"))
    near = get_close_matches(address.lower(), words, n=1) or get_close_matches(kind.lower(), words, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return refusal(f"unknown device {address!r}", inventory, f"{hint}{_how_to_write(inventory)}")


def _how_to_write(inventory: Inventory) -> str:
    example = ",".join(inventory.names[:2]) or "cpu"
    return f"Write names from this list such as {example!r}, or 'auto' for all of them"
