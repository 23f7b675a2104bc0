"""The pace of devices and links as small tables for people."""

from __future__ import annotations

from lightning_hetero.devices.origins import MEASURED
from lightning_hetero.devices.spec import DeviceSpec, Inventory, Link

RATES = ("float64", "float32", "float16", "bfloat16")
DEVICE_PACE_HEADER = ("device", *(f"{dtype} GFLOP/s" for dtype in RATES), "memory GB/s", "launch us", "confidence")
LINK_PACE_HEADER = ("from", "to", "GB/s", "pinned GB/s", "latency us", "confidence")


def device_pace_rows(inventory: Inventory) -> list[tuple[str, ...]]:
    """One row of texts per device, in the inventory's order, under `DEVICE_PACE_HEADER`; "?" is unknown.

    Example:
        >>> rates = (("float32", 1e11),)
        >>> cpu = DeviceSpec(name="cpu", kind="cpu", memory_bytes=1, torch_device="cpu", flops_per_s=rates)
        >>> device_pace_rows(Inventory(devices=(cpu,)))
        [('cpu', '?', '100', '?', '?', '?', '?', 'given')]
    """
    return [_device_row(device) for device in inventory]


def link_pace_rows(inventory: Inventory) -> list[tuple[str, ...]]:
    """One row of texts per link of which something is known, under `LINK_PACE_HEADER`."""
    known = [link for link in inventory.links if link.bandwidth_bytes_per_s is not None or link.latency_s is not None]
    return [_link_row(link) for link in known]


def _device_row(device: DeviceSpec) -> tuple[str, ...]:
    rates = dict(device.flops_per_s)
    return (
        device.name,
        *(_scaled(rates.get(dtype), 1e-9) for dtype in RATES),
        _scaled(device.memory_bytes_per_s, 1e-9),
        _scaled(device.launch_s, 1e6),
        _confidence(device.measured, bool(rates)),
    )


def _link_row(link: Link) -> tuple[str, ...]:
    return (
        link.source,
        link.target,
        _scaled(link.bandwidth_bytes_per_s, 1e-9),
        _scaled(link.pinned_bandwidth_bytes_per_s, 1e-9),
        _scaled(link.latency_s, 1e6),
        _confidence(link.measured, True),
    )


def _scaled(number: float | None, factor: float) -> str:
    """With three significant digits, never in the form 1e+05."""
    if number is None:
        return "?"
    value = number * factor
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _confidence(measured: str, known: bool) -> str:
    if measured == MEASURED:
        return "high"
    return measured or ("given" if known else "")
