"""Precision over several kinds of devices: autocast is entered for each of them.

Lightning chooses one device type for autocast, "cuda" for every accelerator that it does not know. On any other
device that is no autocast at all: the run would silently be in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.strategy.grad_scaler import DeviceGradScaler

if TYPE_CHECKING:
    from lightning.pytorch.plugins import MixedPrecision as _Base
else:
    _Base = object


# Lightning's precision plugins that replace layers by those of a library for CUDA, and those that need their strategy.
_FOR_CUDA = ("TransformerEnginePrecision", "BitsandbytesPrecision")
_FOR_OTHER_STRATEGIES = ("FSDPPrecision", "DeepSpeedPrecision", "XLAPrecision")


class HeteroMixedPrecisionCore(_Base):
    """Mixed into `MixedPrecision` of each Lightning namespace."""

    device_types: tuple[str, ...] = ()

    @classmethod
    def of(cls, plugin: Any) -> Any:
        """The same settings, for several device types."""
        scaler = plugin.scaler
        if type(scaler) in (torch.amp.GradScaler, torch.cuda.amp.GradScaler):
            scaler = DeviceGradScaler.like(scaler)
        return cls(plugin.precision, plugin.device, scaler)

    def use_devices(self, types: tuple[str, ...]) -> None:
        """Say where the model's parts are.

        Args:
            types: Of the devices, the root first.

        Raises:
            UnsupportedError: A device type has no autocast, or the user's own scaler would have to work over several.
        """
        self.device_types = types
        self.device = types[0]
        for kind in types:
            if not torch.amp.is_autocast_available(kind):
                raise UnsupportedError(
                    f"precision={self.precision!r}: torch has no autocast for {kind!r} devices, so that part of the "
                    "model would run in float32. Use precision='32-true' or 'bf16-true', or leave these devices out."
                )
        safe = self.scaler is None or len(types) == 1 or isinstance(self.scaler, DeviceGradScaler)
        if not safe:
            raise UnsupportedError(
                f"precision={self.precision!r} with a {type(self.scaler).__name__} of your own: torch's scalers do not "
                f"wait for numbers that they copy between {' and '.join(types)}. Leave out `scaler`, pass a "
                "torch.amp.GradScaler, use precision='bf16-mixed', or devices of one type."
            )

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast for every device type that the plan uses."""
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.half
        with ExitStack() as stack:
            for kind in self.device_types or (self.device,):
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            yield


def use_devices(plugin: Any, devices: Iterable[torch.device], mixed_precision: type[Any]) -> None:
    """Tell the precision plugin of a run where the model's parts are, and refuse one that cannot work there.

    Args:
        plugin: Of the Trainer.
        devices: The root first.
        mixed_precision: Lightning's class of that name.

    Raises:
        UnsupportedError: The plugin would leave a part of the model in another precision, or needs what is not there.
    """
    types = tuple(dict.fromkeys(device.type for device in devices))
    names = {cls.__name__ for cls in type(plugin).__mro__}
    name = type(plugin).__name__
    if isinstance(plugin, HeteroMixedPrecisionCore):
        plugin.use_devices(types)
    elif isinstance(plugin, mixed_precision) and set(types) != {plugin.device}:
        raise UnsupportedError(
            f"{name} enters autocast for {plugin.device!r} devices only, and the plan uses {' and '.join(types)}: the "
            f"rest of the model would run in float32. Use precision={plugin.precision!r} without a plugin of your own, "
            f"or devices of the type {plugin.device!r}."
        )
    elif names.intersection(_FOR_CUDA) and set(types) != {"cuda"}:
        raise UnsupportedError(
            f"{name} replaces layers by some that run on CUDA devices only, and the plan uses {' and '.join(types)}. "
            "Use precision='bf16-mixed', or CUDA devices only."
        )
    elif names.intersection(_FOR_OTHER_STRATEGIES):
        raise UnsupportedError(f"{name} belongs to another strategy. Use Trainer(precision=...) in its place.")
