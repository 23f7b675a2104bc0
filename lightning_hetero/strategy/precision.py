"""Mixed precision over several kinds of devices: autocast is entered for each of them.

Lightning chooses one device type for autocast, "cuda" for every accelerator that it does not know. On any other
device that is no autocast at all: the run would silently be in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_hetero.errors import UnsupportedError

if TYPE_CHECKING:
    from lightning.pytorch.plugins import MixedPrecision as _Base
else:
    _Base = object


class HeteroMixedPrecisionCore(_Base):
    """Mixed into `MixedPrecision` of each Lightning namespace."""

    device_types: tuple[str, ...] = ()

    @classmethod
    def of(cls, plugin: Any) -> Any:
        """The same settings, for several device types."""
        return cls(plugin.precision, plugin.device, plugin.scaler)

    def use_devices(self, devices: Iterable[torch.device]) -> None:
        """Say where the model's parts are, the root first.

        Raises:
            UnsupportedError: A device type has no autocast, or gradients would have to be scaled over a CPU and
                another device.
        """
        self.device_types = tuple(dict.fromkeys(device.type for device in devices))
        self.device = self.device_types[0]
        for kind in self.device_types:
            if not torch.amp.is_autocast_available(kind):
                raise UnsupportedError(
                    f"precision={self.precision!r}: torch has no autocast for {kind!r} devices, so that part of the "
                    "model would run in float32. Use precision='32-true' or 'bf16-true', or leave these devices out."
                )
        if self.precision == "16-mixed" and len(self.device_types) > 1:
            # torch's GradScaler copies its scale between devices without waiting for the copy; on its way from
            # an accelerator to the CPU the old value can be read.
            raise UnsupportedError(
                f"precision='16-mixed' scales gradients, which is not safe over {' and '.join(self.device_types)}. "
                "Use precision='bf16-mixed', which needs no scaling, or devices of one type."
            )
        if self.scaler is not None and self.scaler._device != self.device:
            self.scaler = torch.amp.GradScaler(self.device)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast for every device type that the plan uses."""
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.half
        with ExitStack() as stack:
            for kind in self.device_types or (self.device,):
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            yield
