"""Hardware to plan for, in one line: cards by name or memory, and the CPU beside them, "2xrtx4090+1x12GiB+cpu"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

from lightning_hetero.devices.cards import cards_inventory, is_cards_request, known_cards
from lightning_hetero.devices.files import SUFFIXES
from lightning_hetero.devices.here import Here
from lightning_hetero.devices.origins import DATA_SHEET
from lightning_hetero.devices.spec import DeviceSpec, Inventory, Link
from lightning_hetero.devices.speeds import with_speeds
from lightning_hetero.errors import InventoryError
from lightning_hetero.units import format_bytes, parse_bytes

_CPU = re.compile(r"\s*(?:1\s*x\s*)?cpu(?:[ -]?(\d.*?))?\s*", re.IGNORECASE)
# What is taken for devices of which no rate is known: a card of the middle class, and a CPU of a desktop.
_CARD_FLOPS_PER_S = (("float32", 20e12), ("float16", 40e12), ("bfloat16", 40e12))
_CARD_MEMORY_BYTES_PER_S = 500e9
_CPU_FLOPS_PER_S = (("float32", 5e11), ("bfloat16", 5e11))
_CPU_MEMORY_BYTES_PER_S = 40e9


def is_preset_request(request: object) -> bool:
    """Whether a device request counts cards or memory sizes, with or without a CPU beside them.

    Example:
        >>> [is_preset_request(text) for text in ("2x24GiB+cpu", "cpu+1xt4", "cuda:0,cpu", "cpu")]
        [True, True, False, False]
    """
    if not isinstance(request, str):
        return False
    return any(is_cards_request(part) and not _CPU.fullmatch(part) for part in _parts(request))


def describes_hardware(request: object) -> bool:
    """Whether a request means hardware that need not be here: a preset, or the path of an inventory file."""
    return is_preset_request(request) or (isinstance(request, str) and request.strip().lower().endswith(SUFFIXES))


def preset_inventory(request: str, here: Here | None = None) -> Inventory:
    """The devices of a request such as "2xrtx4090+1x12GiB+cpu", to plan for and not to train on.

    Args:
        request: Parts joined by "+" or ",": those of `cards_inventory`, and at most one "cpu", which has the memory of
            this machine's, or "cpu-128GiB".
        here: Where the CPU is looked up; None for this machine.

    Raises:
        InventoryError: A part is not of that form, the card is unknown, or there is more than one CPU.

    Example:
        >>> preset_inventory("2xt4+cpu-64GiB").names
        ('cuda:0', 'cuda:1', 'cpu')
    """
    parts = _parts(request)
    hosts = [part for part in parts if _CPU.fullmatch(part)]
    if len(hosts) > 1:
        raise InventoryError(f"{request!r} has {len(hosts)} CPUs, and there is one device 'cpu'; name it once")
    cards = cards_inventory("+".join(part for part in parts if part not in hosts))
    if not hosts:
        return cards
    cpu = _cpu(hosts[0], request, here or Here(None))
    devices = (cpu, *cards) if parts[0] in hosts else (*cards, cpu)
    links = [link for card in cards for link in _host_links(card, cpu)]
    return with_speeds(replace(cards, devices=devices, links=(*cards.links, *links)))


def with_assumptions(inventory: Inventory) -> tuple[Inventory, tuple[str, ...]]:
    """The inventory with rates for every device of which none are known, and sentences that say which are assumed.

    Emulated devices keep what they have: the CPU that plays them sets their pace.
    """
    unknown = [device for device in inventory if not device.flops_per_s and not device.emulated]
    if not unknown:
        return inventory, ()
    names = {device.name for device in unknown}
    devices = tuple(_assumed(device) if device.name in names else device for device in inventory)
    notes = tuple(
        f"Rates of {', '.join(d.name for d in some)} are assumed: {rate / 1e12:g} TFLOP/s in float32, "
        f"{memory / 1e9:g} GB/s of memory."
        for some, rate, memory in (
            ([d for d in unknown if d.kind != "cpu"], _CARD_FLOPS_PER_S[0][1], _CARD_MEMORY_BYTES_PER_S),
            ([d for d in unknown if d.kind == "cpu"], _CPU_FLOPS_PER_S[0][1], _CPU_MEMORY_BYTES_PER_S),
        )
        if some
    )
    return with_speeds(replace(inventory, devices=devices)), notes


def _parts(request: str) -> list[str]:
    return re.split(r"[+,]", request)


def _cpu(part: str, request: str, here: Here) -> DeviceSpec:
    match = _CPU.fullmatch(part)
    size = match[1] if match else None
    if size is None:
        return here.cpu
    try:
        memory_bytes = parse_bytes(size)
    except ValueError as error:
        raise InventoryError(f"{request!r}: {error}; a CPU with its memory is 'cpu-64GiB'") from error
    label = f"a CPU with {format_bytes(memory_bytes)}"
    return DeviceSpec(
        name="cpu", kind="cpu", memory_bytes=memory_bytes, torch_device="cpu", label=label, measured=DATA_SHEET
    )


def _host_links(card: DeviceSpec, cpu: DeviceSpec) -> Iterator[Link]:
    """Both directions, as fast as the card's link to the host, if a data sheet tells it."""
    rates = {known.product: known.host_link_bytes_per_s for known in known_cards().values()}
    rate = rates.get(card.label)
    origin = "" if rate is None else DATA_SHEET
    for source, target in permutations((card.name, cpu.name)):
        yield Link(source=source, target=target, peer_access=True, bandwidth_bytes_per_s=rate, measured=origin)


def _assumed(device: DeviceSpec) -> DeviceSpec:
    on_host = device.kind == "cpu"
    return replace(
        device,
        flops_per_s=_CPU_FLOPS_PER_S if on_host else _CARD_FLOPS_PER_S,
        memory_bytes_per_s=_CPU_MEMORY_BYTES_PER_S if on_host else _CARD_MEMORY_BYTES_PER_S,
    )
