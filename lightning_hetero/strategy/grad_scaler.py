"""Gradient scaling for half precision over several kinds of devices.

torch's `GradScaler` keeps its numbers on the device of the loss, and copies them to the devices of the gradients, and
what it finds there back, without waiting for the copies. On its way from an accelerator to the CPU an old value can be
read then: a step with infinite gradients would be taken, or the scale would be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class DeviceGradScaler(torch.amp.GradScaler):
    """A `GradScaler` whose scale, and whether gradients were infinite, stand on the CPU when they are read.

    Copies to a device are in order with its work; copies to the CPU are waited for. `GradScaler.step` waits for the
    same flags anyway, so this costs a copy of one number for each device.

    There is one flag for all devices: torch adds those of several up, and its fused optimizers take a step unless the
    sum is exactly 1.
    """

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler) -> DeviceGradScaler:
        """One with the settings of another, which torch may have switched off because there is no CUDA."""
        settings: dict[str, Any] = {"enabled": not torch.cuda.is_available()}
        if scaler.is_enabled():
            settings = {
                "init_scale": scaler.get_scale(),
                "growth_factor": scaler.get_growth_factor(),
                "backoff_factor": scaler.get_backoff_factor(),
                "growth_interval": scaler.get_growth_interval(),
            }
        return cls("cpu", **settings)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(torch.device("cpu"))

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        if not found:
            return {}
        return {torch.device("cpu"): torch.stack([flag.cpu() for flag in found.values()]).amax()}
