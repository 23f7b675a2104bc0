"""Relative speeds from rates."""

from __future__ import annotations

from dataclasses import replace

from lightning_hetero.devices.spec import DeviceSpec, Inventory


def with_speeds(inventory: Inventory) -> Inventory:
    """The inventory with the `speed` of its real devices from their float32 rates.

    The CPU has speed 1, which is also the pace of the fastest device that it plays; without a CPU the slowest real
    device has it. Devices without a rate, and emulated ones, stay as they are.
    """
    rates = {device.name: _rate(device) for device in inventory if device.flops_per_s and not device.emulated}
    if not rates:
        return inventory
    hosts = [rates[device.name] for device in inventory if device.kind == "cpu" and device.name in rates]
    unit = hosts[0] if hosts else min(rates.values())
    devices = (
        replace(device, speed=rates[device.name] / unit) if device.name in rates else device for device in inventory
    )
    return replace(inventory, devices=tuple(devices))


def _rate(device: DeviceSpec) -> float:
    return dict(device.flops_per_s).get("float32", device.flops_per_s[0][1])
