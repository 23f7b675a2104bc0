"""Hardware by its data sheet: an inventory of devices that are not here, from "2xrtx4090+1xa100-80gb"."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from itertools import permutations
from typing import Any

from lightning_hetero.devices.dtypes import float_dtypes
from lightning_hetero.devices.memory import usable_memory
from lightning_hetero.devices.origins import DATA_SHEET
from lightning_hetero.devices.spec import DeviceSpec, Inventory, Link
from lightning_hetero.devices.speeds import with_speeds
from lightning_hetero.errors import InventoryError
from lightning_hetero.units import format_bytes, parse_bytes

_GIB = 1024**3
_KIND = "cuda"
_PART = re.compile(r"\s*(\d{1,4})\s*x\s*([\w.][\w .-]*?)\s*", re.IGNORECASE)
_BRANDS = ("nvidia", "amd", "geforce", "tesla", "instinct")
# What people call a card of which there are several: the most common one.
_SHORT = {"a100": "a100-80gb", "h100": "h100-sxm", "h100-80gb": "h100-sxm", "v100": "v100-16gb"}
HOW_TO_WRITE = "write a number and a card or a memory size, '2xrtx4090+1xa100-80gb' or '2x24GiB+1x12GiB'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a data sheet says of one device that torch sees.

    Attributes:
        product: The vendor's name.
        memory_bytes: What it has.
        flops_per_s: Peak of dense products by dtype; "tfloat32" is float32 with tensor cores.
        memory_bytes_per_s: Peak of its memory.
        host_link_bytes_per_s: Peak of its link to the host, in one direction.
        devices_per_card: How many such devices one card shows.
        source: The vendor's document.
        checked: Where else the numbers were found, and which of them.
    """

    product: str
    memory_bytes: int
    flops_per_s: tuple[tuple[str, float], ...] = ()
    memory_bytes_per_s: float | None = None
    host_link_bytes_per_s: float | None = None
    devices_per_card: int = 1
    source: str = ""
    checked: tuple[str, ...] = ()

    def device(self, name: str) -> DeviceSpec:
        """The device with the reserve that is kept of a real one."""
        memory = usable_memory(
            total_bytes=self.memory_bytes, free_bytes=self.memory_bytes, own_bytes=0, reserve_bytes=_GIB // 2
        )
        known = {dtype for dtype, _ in self.flops_per_s}
        return DeviceSpec(
            name=name,
            kind=_KIND,
            memory_bytes=memory.usable_bytes,
            torch_device=name,
            total_memory_bytes=self.memory_bytes,
            label=self.product,
            # Data sheets leave float64 out where it is slow.
            dtypes=tuple(d for d in float_dtypes("cpu") if d in known | {"float64"}) if known else (),
            flops_per_s=self.flops_per_s,
            memory_bytes_per_s=self.memory_bytes_per_s,
            measured=DATA_SHEET,
        )


@cache
def known_cards() -> dict[str, Card]:
    """The cards of `cards.json`, by the name that a request uses."""
    text = files("lightning_hetero.devices").joinpath("cards.json").read_text(encoding="utf-8")
    return {name: _card(**record) for name, record in json.loads(text)["cards"].items()}


def is_cards_request(request: object) -> bool:
    """Whether a device request counts cards or memory sizes; nothing else begins with "2x"."""
    return isinstance(request, str) and re.match(r"\s*\d+\s*x", request, re.IGNORECASE) is not None


def cards_inventory(request: str) -> Inventory:
    """Devices "cuda:0", "cuda:1", ... as data sheets describe them, to plan for and not to train on.

    Links between cards are those through the host, as fast as the slower of the two; latencies and launch costs are
    not in data sheets and stay unknown. A device of which only the memory is given has no rates.

    Args:
        request: Parts joined by "+" or ",": a number and the name of a card, or a number and a memory size.

    Raises:
        InventoryError: A part is not of that form, or the card is unknown.

    Example:
        >>> inventory = cards_inventory("2xrtx4090+1xa100-80gb")
        >>> [(device.name, device.label) for device in inventory][1:]
        [('cuda:1', 'NVIDIA GeForce RTX 4090 24GB'), ('cuda:2', 'NVIDIA A100 SXM 80GB')]
    """
    cards = [card for part in re.split(r"[+,]", request) for card in _cards(part, request)]
    devices = tuple(card.device(f"{_KIND}:{index}") for index, card in enumerate(cards))
    host_links = [card.host_link_bytes_per_s for card in cards]
    links = tuple(
        _link(devices[a].name, devices[b].name, host_links[a], host_links[b])
        for a, b in permutations(range(len(cards)), 2)
    )
    return with_speeds(Inventory(devices=devices, links=links))


def _cards(part: str, request: str) -> Iterator[Card]:
    match = _PART.fullmatch(part)
    if match is None or int(match[1]) < 1:
        raise InventoryError(f"{request!r}: {part.strip()!r} does not count devices; {HOW_TO_WRITE}")
    card = _sized(match[2]) or _named(match[2], request)
    for _ in range(int(match[1]) * card.devices_per_card):
        yield card


def _sized(text: str) -> Card | None:
    """A device of which only the memory is known, if the text is a size with a unit."""
    try:
        memory_bytes = 0 if text.isdecimal() else parse_bytes(text)
    except ValueError:
        return None
    return (
        Card(product=f"a device with {format_bytes(memory_bytes)}", memory_bytes=memory_bytes) if memory_bytes else None
    )


def _named(text: str, request: str) -> Card:
    cards = known_cards()
    by_letters = {_letters(name): card for name, card in cards.items()}
    by_letters |= {_letters(short): cards[name] for short, name in _SHORT.items()}
    letters = _letters(text)
    if letters in by_letters:
        return by_letters[letters]
    near = get_close_matches(text.lower(), [*cards, *_SHORT], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InventoryError(
        f"{request!r}: there is no data sheet of {text!r}.{hint} Known are {', '.join(cards)}. For other hardware "
        "write its memory, '2x24GiB', or describe it in an inventory file"
    )


def _letters(name: str) -> str:
    """A name without what people write in different ways: case, spaces, hyphens, and the brand."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    for brand in _BRANDS:
        letters = letters.removeprefix(brand)
    return letters


def _card(
    *,
    product: str,
    memory_gib: float,
    memory_bytes_per_s: float,
    host_link_bytes_per_s: float,
    devices_per_card: int,
    flops_per_s: dict[str, float],
    **documents: Any,
) -> Card:
    """One device of a card; the numbers of the file are those of the whole card."""
    return Card(
        product=product,
        memory_bytes=int(memory_gib * _GIB) // devices_per_card,
        flops_per_s=tuple((dtype, rate / devices_per_card) for dtype, rate in flops_per_s.items()),
        memory_bytes_per_s=memory_bytes_per_s / devices_per_card,
        host_link_bytes_per_s=host_link_bytes_per_s,
        devices_per_card=devices_per_card,
        source=documents["source"],
        checked=tuple(documents["checked"]),
    )


def _link(source: str, target: str, one: float | None, other: float | None) -> Link:
    link = Link(source=source, target=target)
    if one is None or other is None:
        return link
    return replace(link, bandwidth_bytes_per_s=min(one, other), measured=DATA_SHEET)
