"""The accelerator `hetero`: how `Trainer(accelerator="hetero", devices=...)` asks for devices of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_hetero.devices import Inventory, discover, resolve_devices
from lightning_hetero.errors import UsageError
from lightning_hetero.strategy.device_stats import memory_stats

if TYPE_CHECKING:
    from lightning.pytorch.accelerators import Accelerator as _Base
else:
    _Base = object


class RequestedDevices(list[torch.device]):
    """What the host sees of a request: the root device alone, while the whole inventory travels along.

    With more than one entry the host would take a Trainer without a strategy for a data-parallel one.
    """

    def __init__(self, inventory: Inventory) -> None:
        super().__init__([torch.device(str(inventory.root.torch_device))])
        self.inventory = inventory


class HeteroAcceleratorCore(_Base):
    """Mixed into `Accelerator` of each Lightning namespace."""

    user = "Trainer"
    serves_strategy = False  # set by HeteroStrategy: nobody else can work with several devices

    _current_before: torch.device | None = None

    def setup_device(self, device: torch.device) -> None:
        """Make `device` the current one of its kind, until `teardown`.

        Raises:
            UsageError: The Trainer or Fabric has another strategy.
        """
        if not self.serves_strategy:
            raise UsageError(
                'accelerator="hetero" needs strategy="hetero", which places the model over the devices. Write '
                f'{self.user}(accelerator="hetero", devices=..., strategy="hetero").'
            )
        if device.type != "cpu" and device.index is not None:
            module = torch.get_device_module(device)
            if self._current_before is None:
                self._current_before = torch.device(device.type, module.current_device())
            module.set_device(device.index)

    def setup(self, trainer: Any) -> None:
        """Nothing to do: the strategy places the model."""

    def teardown(self) -> None:
        """Put the current device back, and give cached memory back where the backend can."""
        before, self._current_before = self._current_before, None
        if before is not None:
            torch.get_device_module(before).set_device(before.index)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Memory figures of one device, under torch's own names; empty where the backend has none."""
        return memory_stats(torch.device(device))

    @staticmethod
    def parse_devices(devices: Any) -> Inventory:
        """Read `Trainer(devices=...)`; see `lightning_hetero.resolve_devices`.

        Raises:
            InventoryError: The request cannot be met.
        """
        return resolve_devices(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The root device, which carries the inventory."""
        return RequestedDevices(devices if isinstance(devices, Inventory) else resolve_devices(devices))

    @staticmethod
    def auto_device_count() -> int:
        """Number of devices that can train here."""
        return len(discover().trainable)

    @staticmethod
    def is_available() -> bool:
        """Always: there is a CPU."""
        return True

    @staticmethod
    def name() -> str:
        """The word for it in `Trainer(accelerator=...)`."""
        return "hetero"
