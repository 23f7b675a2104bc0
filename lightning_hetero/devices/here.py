"""The devices to choose from, discovered no further than a request needs."""

from __future__ import annotations

from functools import cached_property

from lightning_hetero.devices.discover import discover
from lightning_hetero.devices.lookup import find
from lightning_hetero.devices.spec import DeviceSpec, Inventory


class Here:
    """This machine, or the inventory that stands for it.

    A request for the CPU and emulated devices alone must not start CUDA, which takes seconds and memory.

    Args:
        discovered: The inventory to choose from; None discovers when asked.
    """

    def __init__(self, discovered: Inventory | None) -> None:
        self._discovered = discovered

    @cached_property
    def inventory(self) -> Inventory:
        """All devices."""
        return discover() if self._discovered is None else self._discovered

    @cached_property
    def host(self) -> Inventory:
        """At least the CPU; asks no accelerator."""
        return discover(modules={}) if self._discovered is None else self._discovered

    @cached_property
    def cpu(self) -> DeviceSpec:
        """The CPU, which plays the emulated devices, even where the inventory leaves it out."""
        cpus = [device for device in self.host if device.kind == "cpu"]
        return cpus[0] if cpus else discover(modules={}).root

    def find(self, address: str) -> tuple[DeviceSpec, ...]:
        """The devices that `address` means.

        Raises:
            InventoryError: No or no single device is meant.
        """
        return find(address, self.host if address == "cpu" and "cpu" in self.host else self.inventory)

    def real(self, torch_device: str) -> DeviceSpec | None:
        """The device that torch calls `torch_device`; None if there is no such device."""
        inventory = self.host if torch_device == "cpu" else self.inventory
        candidates = [device for device in inventory.trainable if not device.emulated]
        for device in candidates:
            if device.torch_device == torch_device:
                return device
        # "mps" is "mps:0" where there is one.
        of_kind = [device for device in candidates if device.kind == torch_device]
        return of_kind[0] if len(of_kind) == 1 else None
