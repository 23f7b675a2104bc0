"""The inventory with measured numbers: from a user's profile, from the cache, or from measuring now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from os import PathLike

from lightning_hetero.devices.bench import Bench
from lightning_hetero.devices.numbers import DeviceNumbers, DeviceProfile
from lightning_hetero.devices.origins import DATA_SHEET, LOW_CONFIDENCE, MEASURED
from lightning_hetero.devices.profile_files import DeviceCache, read_device_profile
from lightning_hetero.devices.spec import DeviceSpec, Inventory, Link
from lightning_hetero.devices.speeds import with_speeds
from lightning_hetero.errors import InventoryError


def measured_inventory(
    inventory: Inventory,
    *,
    cache: bool = True,
    refresh: bool = False,
    profile: str | PathLike[str] | None = None,
) -> Inventory:
    """The inventory with `flops_per_s`, `memory_bytes_per_s`, `launch_s`, `speed` and the pace of its links.

    Numbers come, in this order, from `profile`, from the inventory itself, from the cache, and from measuring, which
    takes some seconds. An emulated device has the numbers of the CPU, with its number of threads, slowed down as the
    runtime slows it down; its speed stays as it is, and so do the links of emulated devices. The speed of a real
    device is its float32 rate by that of the CPU, or of the slowest device where there is no CPU.

    What is noisy is marked `measured="low confidence"` and measured again next time: no two passes that agree within
    30 %, or a machine that had more work than cores.

    Args:
        inventory: Devices of this machine; those described by a data sheet are left as they are.
        cache: Whether to read and write the cache, see `DeviceCache`.
        refresh: Whether to measure what was measured before.
        profile: A device profile, which is believed in any case.

    Raises:
        InventoryError: Torch does not reach a device, the profile cannot be read, or it speaks of none of the devices.
    """
    given = DeviceProfile() if profile is None else _given(profile, inventory)
    found = _of_this_machine(inventory, given, cache=cache, refresh=refresh)
    fastest = max((device.speed for device in inventory if device.emulated), default=1.0)
    devices = []
    for device in inventory:
        believed = _numbers_of(device, given)
        numbers = believed or (_numbers_of(device, found) if _is_open(device, refresh) else None)
        own = device if believed is None and not device.measured else None
        devices.append(device if numbers is None else _with_numbers(device, numbers, fastest, own))
    links = tuple(_links(inventory, given, found, refresh))
    return with_speeds(replace(inventory, devices=tuple(devices), links=links))


def _given(path: str | PathLike[str], inventory: Inventory) -> DeviceProfile:
    given = read_device_profile(path)
    names = {name for device in inventory for name in (device.name, device.torch_device)}
    ends = {end for link in given.links for end in (link.source, link.target)}
    if not names & ({numbers.device for numbers in given.devices} | ends):
        raise InventoryError(
            f"the device profile {str(path)!r} speaks of none of the devices {', '.join(inventory.names)}; it has "
            f"{', '.join(sorted({numbers.device for numbers in given.devices})) or 'none'}"
        )
    return given


def _of_this_machine(inventory: Inventory, given: DeviceProfile, *, cache: bool, refresh: bool) -> DeviceProfile:
    """What the inventory and the profile leave open, from the cache or measured."""
    benches = _benches(inventory, given, refresh)
    pairs = _pairs(inventory, given, refresh)
    if not benches and not pairs:
        return DeviceProfile()
    from lightning_hetero.devices.machine_key import machine_key  # these two import torch
    from lightning_hetero.devices.measure import measure

    folder = DeviceCache()
    key = machine_key(device for device in inventory if _is_here(device))
    kept = folder.get(key) if cache else DeviceProfile()
    known = DeviceProfile() if refresh else kept
    open_benches = [bench for bench in benches if known.device(bench.torch_device, threads=bench.threads) is None]
    open_pairs = [(a, b) for a, b in pairs if known.link((a.torch_device, b.torch_device)) is None]
    if open_benches or open_pairs:
        fresh = measure(open_benches, open_pairs)
        known = fresh.and_then(known)
        if cache:
            folder.put(key, fresh.confident().and_then(kept))
    return known


def _benches(inventory: Inventory, given: DeviceProfile, refresh: bool) -> list[Bench]:
    """Where to measure: each open device, and the CPU with each number of threads that emulated devices have."""
    benches: dict[tuple[str | None, int | None], Bench] = {}
    for device in inventory:
        if _is_open(device, refresh) and _numbers_of(device, given) is None:
            threads = device.threads if device.emulated else None
            bench = Bench(str(device.torch_device), threads, device.memory_bytes, device.dtypes)
            benches.setdefault((device.torch_device, threads), bench)
    return list(benches.values())


def _pairs(inventory: Inventory, given: DeviceProfile, refresh: bool) -> list[tuple[Bench, Bench]]:
    def bench(device: DeviceSpec) -> Bench:
        return Bench(str(device.torch_device), None, device.memory_bytes)

    return [
        (bench(source), bench(target))
        for source, target in permutations(inventory, 2)
        if _is_open_link(source, target, inventory.link(source.name, target.name), refresh)
        and given.link(*_ends(source, target)) is None
    ]


def _is_here(device: DeviceSpec) -> bool:
    """Whether torch computes on the device itself, and it is no description of hardware elsewhere."""
    real = device.trainable and not device.emulated and device.torch_device is not None
    return real and device.measured != DATA_SHEET


def _is_open(device: DeviceSpec, refresh: bool) -> bool:
    """Whether measuring has something to say: never of what is elsewhere, nor where the user knows better."""
    here = device.emulated or _is_here(device)
    return here and _is_unknown(device.measured, bool(device.flops_per_s), refresh)


def _is_open_link(source: DeviceSpec, target: DeviceSpec, link: Link, refresh: bool) -> bool:
    here = _is_here(source) and _is_here(target)
    known = link.bandwidth_bytes_per_s is not None or link.latency_s is not None
    return here and _is_unknown(link.measured, known, refresh)


def _is_unknown(measured: str, has_numbers: bool, refresh: bool) -> bool:
    return not has_numbers or measured == LOW_CONFIDENCE or (refresh and measured == MEASURED)


def _ends(source: DeviceSpec, target: DeviceSpec) -> tuple[tuple[str | None, str | None], ...]:
    """What a profile may call a link; never that of an emulated device by the name of what plays it."""
    by_name, by_torch = (source.name, target.name), (source.torch_device, target.torch_device)
    return (by_name, by_torch) if _is_here(source) and _is_here(target) else (by_name,)


def _numbers_of(device: DeviceSpec, profile: DeviceProfile) -> DeviceNumbers | None:
    """Those under its own name, or torch's; for an emulated device without any, those of the CPU that plays it."""
    if not device.emulated:
        return profile.device(device.name, device.torch_device)
    return profile.device(device.name) or profile.device(device.torch_device, threads=device.threads)


def _with_numbers(device: DeviceSpec, numbers: DeviceNumbers, fastest: float, own: DeviceSpec | None) -> DeviceSpec:
    """The device with these numbers, slowed down if they are those of the CPU that plays it.

    Args:
        device: The device.
        numbers: Its new numbers.
        fastest: The speed of the fastest emulated device, which runs at the CPU's own pace.
        own: The device, if what it has comes from the user, who knows better.
    """
    slower = fastest / device.speed if device.emulated and numbers.device != device.name else 1.0
    memory, launch_s = numbers.memory_bytes_per_s, numbers.launch_s
    return replace(
        device,
        flops_per_s=tuple((dtype, rate / slower) for dtype, rate in numbers.flops_per_s),
        memory_bytes_per_s=(own and own.memory_bytes_per_s) or (memory and memory / slower),
        launch_s=(own and own.launch_s) or (launch_s and launch_s * slower),
        measured=numbers.measured,
    )


def _links(inventory: Inventory, given: DeviceProfile, found: DeviceProfile, refresh: bool) -> Iterator[Link]:
    """The links that the inventory lists, and others that are known, with their numbers."""
    listed = {(link.source, link.target) for link in inventory.links}
    others = (Link(source=a, target=b) for a, b in permutations(inventory.names, 2) if (a, b) not in listed)
    for link in (*inventory.links, *others):
        source, target = inventory[link.source], inventory[link.target]
        numbers = given.link(*_ends(source, target))
        if numbers is None and _is_open_link(source, target, link, refresh):
            numbers = found.link(*_ends(source, target))
        if numbers is not None:
            yield replace(
                link,
                bandwidth_bytes_per_s=numbers.bandwidth_bytes_per_s,
                latency_s=numbers.latency_s,
                pinned_bandwidth_bytes_per_s=numbers.pinned_bandwidth_bytes_per_s,
                measured=numbers.measured,
            )
        elif (link.source, link.target) in listed:
            yield link
