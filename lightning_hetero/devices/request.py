"""The parts of a device request: text split at its commas, and other sequences entry by entry."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, TypeAlias

from lightning_hetero.devices.emulated import Emulation, parse_emulation
from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.errors import InventoryError

# An address such as "cuda:*", an emulated device, a device as it is, or a device written as a mapping.
Item: TypeAlias = "str | Emulation | DeviceSpec | Mapping[str, Any]"

FORMS = (
    "Write a number of devices, names such as 'cuda:0,cpu' or ['cuda:0', 'cpu'], limits such as "
    "{'cuda:0': '10GiB'}, the path of an inventory file, or 'auto' for all devices"
)


def split_request(parts: Iterable[object]) -> list[Item]:
    """The items of a request, in order; texts may hold several, separated by commas.

    Args:
        parts: Texts, `torch.device`s, `DeviceSpec`s and mappings.

    Raises:
        InventoryError: A part is a bare index, or nothing that can name a device.
    """
    return [item for part in parts for item in _items(part)]


def torch_name(value: object) -> str | None:
    """The name of a `torch.device`; None for everything else, and without importing torch."""
    torch = sys.modules.get("torch")
    return str(value) if torch is not None and isinstance(value, torch.device) else None


def _items(part: object) -> list[Item]:
    if isinstance(part, str):
        return [_from_text(piece) for piece in _pieces(part)]
    if isinstance(part, (DeviceSpec, Mapping)):
        return [part]
    name = torch_name(part)
    if name is not None:
        return [name]
    if not isinstance(part, bool) and isinstance(part, Integral):
        raise _bare_index(part)
    raise InventoryError(f"{part!r} does not name a device. {FORMS}.")


def _pieces(text: str) -> list[str]:
    """Split at commas, but keep the keys of an emulated device together: "cpu@speed=1,mem=2GiB"."""
    pieces: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if "=" in piece and "@" not in piece:
            if not pieces or "@" not in pieces[-1]:
                raise InventoryError(
                    f"{text!r}: {piece!r} belongs to no emulated device; write for example 'cpu@{piece}'"
                )
            pieces[-1] += f",{piece}"
        else:
            pieces.append(piece)
    return pieces


def _from_text(piece: str) -> Item:
    if not piece:
        raise InventoryError(f"a device request has an empty part between commas. {FORMS}.")
    if piece.lstrip("+-").isdecimal():
        raise _bare_index(piece)
    if piece == "auto":
        raise InventoryError("'auto' means all devices, so it stands alone; leave the other names out")
    return parse_emulation(piece) if "@" in piece else piece


def _bare_index(index: object) -> InventoryError:
    return InventoryError(
        f"{index} in a list of devices is ambiguous: it could count the cuda devices or all devices. "
        f"Write names such as 'cuda:{str(index).lstrip('+-')}', or one number alone for that many devices."
    )
